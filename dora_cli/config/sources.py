"""YAML with the file and line of every key, so that an error can say where it comes from."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dora_cli.errors import UserError

SWEEP = "hydra.sweeper.params."  # below it stand whole keys (train.epochs) with what -m sweeps over


@dataclass(frozen=True)
class Leaf:
    """One value of a file: its dotted key, and ``where`` it stands ("in FILE, line 7")."""

    key: str
    value: Any
    where: str


@dataclass(frozen=True)
class Source:
    """One YAML file, read: its leaves, and the entries of its defaults list as (key, value, where)."""

    path: Path
    text: str
    leaves: tuple[Leaf, ...]
    defaults: tuple[tuple[str, str, str], ...]


MOST_VALUES = 100_000  # a small file of aliases to aliases can stand for billions


def place(path: Path, line: int | None = None) -> str:
    """``in FILE, line 7``, the file relative to the working directory where it lies below it."""
    path, here = Path(path), Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f"in {shown}" if line is None else f"in {shown}, line {line}"


def read(path: Path) -> Source:
    """Read a YAML file.

    Raises:
        UserError: unreadable, not UTF-8, not YAML, not a mapping, or with a defaults list that is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        hint = f"byte {error.start} cannot be read; save the file as UTF-8"
        raise UserError(f"{path} is not UTF-8 text", hint=hint) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node and not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path} must hold keys and values, such as 'budget: r8'", where=place(path, 1))
        if node and _expanded(node, {}) > MOST_VALUES:
            raise UserError(f"{path} holds more than {MOST_VALUES:,} values once its aliases (*name) are written out")
        # OmegaConf's reader, since Hydra reads the file with it: it takes 8e-4 for a number and refuses duplicate keys.
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if node else {}
    except yaml.YAMLError as error:
        raise _malformed(path, error) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    assert isinstance(values, dict)
    defaults = tuple(_defaults(path, node)) if node else ()
    leaves = tuple(_leaves(path, node, values, "")) if node else ()
    return Source(path, text, tuple(leaf for leaf in leaves if leaf.key.split(".")[0] != "defaults"), defaults)


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Nodes below and with this one, each alias counted as all it stands for; infinite where one holds itself."""
    if id(node) not in known:
        known[id(node)] = inf  # until it is known: who meets it below itself has found a circle
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _malformed(path: Path, error: yaml.YAMLError) -> UserError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
    where = place(path, mark.line + 1 if mark else None)
    hint = "quote values that hold ':', '#', '{', '[', '@' or '%'"
    return UserError(f"malformed YAML: {problem}", where=where, hint=hint)


def _leaves(path: Path, node: yaml.MappingNode, values: dict[Any, Any], prefix: str) -> Iterator[Leaf]:
    """Walk the nodes (they know their lines) and the values (they are what YAML means) side by side."""
    aligned = len(node.value) == len(values)  # not with merge keys (<<); then the mapping's own line must do
    for position, (key, value) in enumerate(values.items()):
        key_node, value_node = node.value[position] if aligned else (node, None)
        where = place(path, key_node.start_mark.line + 1)
        if not isinstance(key, str):
            raise UserError(f"the key '{prefix}{key}' is not text", where=where, hint="write it in quotes")
        if "." in key and prefix != SWEEP:
            raise UserError(f"'{prefix}{key}' has a dot in it", where=where, hint="write one key below the other")
        if isinstance(value, dict) and value:
            if not isinstance(value_node, yaml.MappingNode):
                value_node = yaml.MappingNode("", [], key_node.start_mark)
            yield from _leaves(path, value_node, value, f"{prefix}{key}.")
        else:
            yield Leaf(f"{prefix}{key}", value, where)


def _defaults(path: Path, node: yaml.MappingNode) -> Iterator[tuple[str, str, str]]:
    for key_node, list_node in node.value:
        if key_node.value != "defaults":
            continue
        if not isinstance(list_node, yaml.SequenceNode):
            raise UserError("'defaults' must be a list", where=place(path, key_node.start_mark.line + 1))
        for item in list_node.value:
            where = place(path, item.start_mark.line + 1)
            pairs = item.value if isinstance(item, yaml.MappingNode) else [(item, item)]
            if len(pairs) != 1 or not all(isinstance(n, yaml.ScalarNode) for n in pairs[0]):
                hint = "write '- override /method: dora'"
                raise UserError("cannot read this entry of 'defaults'", where=where, hint=hint)
            yield pairs[0][0].value, pairs[0][1].value, where
