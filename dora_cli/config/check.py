"""Which keys there are, and the refusal of everything else: unknown keys, wrong types, ranges, contradictions."""

import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dora_cli.config.recipes import GROUPS
from dora_cli.config.schema import Config
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean, near


@dataclass(frozen=True)
class Key:
    """One key of the schema: its dotted name, its type, and the metadata of its field."""

    name: str
    hint: Any
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_free(self) -> bool:
        """Whether any key may stand below it (``data.columns.text``)."""
        return get_origin(self.hint) is dict

    @property
    def is_open(self) -> bool:
        """Whether a list could be one value of it."""
        return any(kind is Any or get_origin(kind) is list for kind in _alternatives(self.hint))

    @property
    def is_text(self) -> bool:
        kinds = _alternatives(self.hint)
        return (
            str in kinds and Any not in kinds and bool not in kinds
        )  # true or "true": Hydra's grammar tells them apart


def known_keys(schema: type, prefix: str = "") -> dict[str, Key]:
    """All keys of a nested dataclass, by dotted name."""
    hints, keys = get_type_hints(schema), {}
    for f in fields(schema):
        name = prefix + f.name
        if is_dataclass(hints[f.name]):
            keys.update(known_keys(hints[f.name], name + "."))
        else:
            keys[name] = Key(name, hints[f.name], f.metadata)
    return keys


def find_key(name: str, keys: Mapping[str, Key], where: str | None = None) -> Key:
    """The key of that name.

    Raises:
        UserError: there is none; says the nearest ones.
    """
    if name in keys:
        return keys[name]
    parent = keys.get(name.rpartition(".")[0])
    if parent and parent.is_free:
        return Key(name, get_args(parent.hint)[1])
    if parent:
        raise UserError(f"'{name}': {parent.name} is {describe(parent.hint)} and has no keys below it", where=where)
    if name.startswith(("hydra.", "hydra/")) or name == "hydra":
        hint = "the run folder is out, and -m runs a sweep, by hydra/launcher=NAME"
        raise UserError(f"'{name}' is Hydra's own key", where=where, hint=hint)
    if name in GROUPS:
        hint = f"in a file write '- override /{name}: NAME' under defaults, on the command line {name}=NAME"
        raise UserError(f"'{name}' is chosen by name", where=where, hint=hint)
    section = [k for k in keys if k.startswith(name + ".")]
    if section:
        raise UserError(f"'{name}' is a group of keys, not a value", where=where, hint="it has " + ", ".join(section))
    raise unknown_key(name, keys, where)


def unknown_key(name: str, keys: Iterable[str], where: str | None = None) -> UserError:
    """The refusal of a mistyped key, with its nearest neighbours and the keys beside the nearest."""
    keys = list(keys)
    last = name.rpartition(".")[2]
    ends = {k.rpartition(".")[2]: k for k in reversed(keys)}
    same_end = [k for k in keys if k.rpartition(".")[2] == last]
    guesses = list(dict.fromkeys(same_end + near(name, keys) + [ends[e] for e in near(last, ends)]))[:3]
    if not guesses:
        return UserError(f"unknown key '{name}'", where=where, hint="dora-train --help lists the keys")
    section = guesses[0].rpartition(".")[0]
    beside = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section]
    listing = ", ".join(beside[:24]) + (", …" if len(beside) > 24 else "")
    hint = "did you mean " + " or ".join(f"'{g}'" for g in guesses) + "?"
    return UserError(f"unknown key '{name}'", where=where, hint=f"{hint}   (all of {section or 'the top'}: {listing})")


# ---- types --------------------------------------------------------------------------------------------------------


def check_type(key: Key, value: Any, where: str | None = None) -> None:
    """Refuse a value that the key's type does not take. Interpolations pass; they are checked when resolved.

    Raises:
        UserError: naming key, value and what is expected.
    """
    if isinstance(value, str) and "${" in value:
        try:
            OmegaConf.create([value])
        except OmegaConfBaseException:
            hint = "${ begins an interpolation such as ${seed}; for the characters themselves write \\${"
            raise UserError(f"cannot read {key.name}={value}", where=where, hint=hint) from None
        return
    kinds = _alternatives(key.hint)
    if Any in kinds:
        return
    if key.is_text or get_origin(kinds[0]) is list:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                raise UserError(
                    f"{key.name} expects text, and got the truth value {show(item)}",
                    where=where,
                    hint="YAML takes an unquoted yes, no, on, off, true or false for one; write it in quotes",
                )
    number_for_truth = bool in kinds and isinstance(value, (int, float)) and not isinstance(value, bool)
    if number_for_truth or not _takes(key.hint, value):
        offered = ", ".join(map(show, key.meta.get("choices", ())))
        what = f"one of {offered}" if offered and bool in kinds else describe(key.hint)
        raise UserError(f"{key.name}={show(value)} is not {what}", where=where)


def _takes(hint: Any, value: Any) -> bool:
    holder = _holder(hint)
    if holder is None:
        return True
    try:
        holder.value = value
    except OmegaConfBaseException:
        return False
    return True


@lru_cache
def _holder(hint: Any) -> DictConfig | None:
    """A configuration whose ``value`` takes what the type takes, or None: its part looks after that type."""
    try:
        holder: DictConfig = OmegaConf.structured(make_dataclass("Holder", [("value", hint, field(default="???"))]))
    except OmegaConfBaseException:  # a type that OmegaConf does not know
        return None
    return holder


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(a for a in get_args(hint) if a is not type(None))
    return (hint,)


def describe(hint: Any) -> str:
    """A type in words."""
    kinds = _alternatives(hint)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if float in kinds:
        text = "a number"
    elif get_origin(kinds[0]) is list:
        text = "a list such as [a, b]"
    elif get_origin(kinds[0]) is dict:
        text = "a mapping such as {role: name}"
    else:
        text = " or ".join(words.get(k, str(k)) for k in kinds)
    return f"{text} or null" if type(None) in get_args(hint) else text


def show(value: Any) -> str:
    """A value as the user writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}"
    return str(value)


# ---- ranges -------------------------------------------------------------------------------------------------------


def check_range(key: Key, value: Any, where: str | None = None) -> None:
    """Refuse a number outside ``low`` / ``high`` (inclusive) or ``above`` / ``below`` (strict), a choice not offered.

    Raises:
        UserError: naming key, value and range.
    """
    meta, shown = key.meta, f"{key.name}={show(value)}"
    if value is None:
        return
    if "choices" in meta and value not in meta["choices"]:
        hint = did_you_mean(str(value), map(show, meta["choices"]))
        raise UserError(f"{shown} is not offered", where=where, hint=hint)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise UserError(f"{shown} is not a finite number", where=where)
    limits = [
        ("low", value >= meta.get("low", value), "{} or more"),
        ("above", value > meta.get("above", -math.inf), "above {}"),
        ("high", value <= meta.get("high", value), "{} or less"),
        ("below", value < meta.get("below", math.inf), "below {}"),
    ]
    if not all(holds for _, holds, _ in limits):
        rule = " and ".join(text.format(meta[name]) for name, _, text in limits if name in meta)
        raise UserError(f"{shown} is out of range", where=where, hint=f"it must be {rule}")
    share_or_steps = {int, float} <= set(_alternatives(key.hint))
    if share_or_steps and isinstance(value, float) and value > 1 and not value.is_integer():
        raise UserError(f"{shown} is neither a share of the run (below 1) nor a whole number of steps", where=where)


# ---- contradictions -----------------------------------------------------------------------------------------------


def check_config(config: Config, where: Callable[[str], str | None]) -> None:
    """Rules between keys. ``where`` gives the place of a key, for the message.

    Raises:
        UserError: keys that contradict each other, or something without which nothing can run.
    """
    data = config.data
    if config.resume and config.overwrite:
        raise UserError("resume=true goes on with a run and overwrite=true replaces it", hint="set one of them")
    if data.name is None and data.path is None:
        raise UserError("there is no data", hint="set data.path to a file or folder, or choose data=NAME")
    if config.hub.private is not None and config.push_to_hub is None:
        raise UserError("hub.private has no meaning without push_to_hub", where=where("hub.private"))
    if data.streaming and config.train.max_steps is None:
        raise UserError(
            "data.streaming=true needs train.max_steps: nobody knows how many rows an epoch has",
            where=where("data.streaming"),
            hint="set for example train.max_steps=10000; learning rate and pruning are planned over it",
        )
    if data.shuffle_buffer is not None and not data.streaming:
        raise UserError(
            f"data.shuffle_buffer={data.shuffle_buffer} is for streamed rows; all others are shuffled as a whole",
            where=where("data.shuffle_buffer"),
            hint="leave it out, or set data.streaming=true",
        )
    if data.streaming and config.train.workers:
        raise UserError(
            f"train.workers={config.train.workers}: streamed rows are put together by the process that trains",
            where=where("train.workers"),
            hint="set train.workers=0",
        )
    if data.labels is not None and len(set(data.labels)) != len(data.labels):
        raise UserError(f"data.labels={show(data.labels)} names a label twice", where=where("data.labels"))
    if data.labels is not None and len(data.labels) < 2:
        raise UserError(
            f"data.labels={show(data.labels)} leaves nothing to choose between",
            where=where("data.labels"),
            hint="list all labels, or null to read them from the data",
        )
