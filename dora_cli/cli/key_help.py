"""``--help KEY``: one key of a command, from the schema and the parts' source, without importing anything slow."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dora_cli.cli.help import WIDTH, columns, offers, shown
from dora_cli.cli.part_keys import part_keys
from dora_cli.config import sweeps
from dora_cli.config.recipes import GROUPS, recipes_dir
from dora_cli.config.schema import MISSING, PART_GROUPS, Config
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean, near

WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "Any": ""}
LIMITS = {"low": "{} or more", "above": "above {}", "high": "{} or less", "below": "below {}"}


def explain_plain(topic: str, keys: Mapping[str, str], command: str) -> str:
    """A key of a command whose keys are words alone.

    Raises:
        UserError: there is no such key.
    """
    key = topic.rstrip("=")
    if key not in keys:
        raise UserError(f"unknown key '{key}'", hint=did_you_mean(key, keys))
    return "\n".join([key, *_lines("", keys[key]), *_lines("set", f"{command} {key}=…")])


def explain(topic: str, folders: Sequence[Path] = ()) -> str:
    """A key of ``dora-train``, or all keys below one: what it is, its type and range, its default, how it is set.

    Of a group (``method``, ``schedule``, ``hydra/launcher``) also the choices.

    Args:
        topic: as it is typed.
        folders: where recipes lie; left out, the shipped ones.

    Raises:
        UserError: there is no such key; says the nearest ones.
    """
    key = topic.rstrip("=.").lstrip("+")
    known = _known()
    below = [known[name] for name in known if name.startswith(f"{key}.")]
    groups = (*GROUPS, *sweeps.GROUPS)
    if key in known:
        return known[key]
    if key in groups:
        return "\n\n".join([_group(key, folders or [recipes_dir()]), *below])
    if below:
        return "\n\n".join(below)
    parent = key.rpartition(".")[0]
    if parent in known and "mapping" in known[parent]:
        return known[parent]
    close = " or ".join(f"'{name}'" for name in near(key, [*known, *groups]))
    raise UserError(
        f"unknown key '{key}'", hint=f"did you mean {close}?" if close else "dora-train --help lists all of them"
    )


def _group(group: str, folders: Sequence[Path]) -> str:
    """What a group offers, a sentence each, and how one is chosen."""
    if group in GROUPS:
        rows = offers(group, folders)
        where = "" if group == "recipe" else ", or under defaults in a recipe"
    else:
        rows = {n: str(c.__doc__) if isinstance(c, type) else f"optuna's {c}" for n, c in sweeps.GROUPS[group].items()}
        where = ", of a sweep (-m)"
    return "\n".join([f"{group}, one of:", *columns(rows), *_lines("set", f"{group}=NAME on the command line{where}")])


def _known() -> dict[str, str]:
    found = {}
    for name, hint, default, meta in _schema(Config):
        found[name] = _page(name, hint, shown(default), meta)
    for group in PART_GROUPS:
        for name, key in part_keys(group).items():
            values = set(map(shown, key.defaults.values()))
            defaults = values.pop() if len(values) == 1 else _by_value(key.defaults)
            read = f"by {group}=" + ", ".join(key.defaults)
            found[name] = _page(name, key.hint, defaults, key.meta, read)
    return found


def _schema(schema: type, prefix: str = "") -> list[tuple[str, str, Any, Mapping[str, Any]]]:
    hints, found = get_type_hints(schema), []
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            found += _schema(hints[f.name], f"{prefix}{f.name}.")
            continue
        default = f.default_factory() if f.default_factory is not NO_DEFAULT else f.default
        hint = f.type.__name__ if isinstance(f.type, type) else str(f.type)
        found.append((prefix + f.name, hint, "none: it must be set" if default == MISSING else default, f.metadata))
    return found


def _page(name: str, hint: str, default: str, meta: Mapping[str, Any], read: str = "") -> str:
    section, dot, last = name.rpartition(".")
    free = hint.startswith("dict")
    value = "NAME" if free else "VALUE"
    typed = f"{name}.ROLE" if free else name
    limits = " and ".join(text.format(meta[limit]) for limit, text in LIMITS.items() if limit in meta)
    rows = {
        "": meta.get("help", ""),
        "type": type_words(hint),
        "range": limits,
        "one of": ", ".join(map(shown, meta.get("choices", ()))),
        "default": default,
        "read": read,
        "set": f"{typed}={value} on the command line, or in a recipe",
    }
    lines = [name]
    for key, text in rows.items():
        lines += _lines(key, text) if text else []
    nested = [*(section.split(".") if dot else []), last, *(["ROLE"] if free else [])]
    lines += [f"{' ' * (14 + 2 * i)}{part}:{f' {value}' * (i == len(nested) - 1)}" for i, part in enumerate(nested)]
    return "\n".join(lines)


def type_words(hint: str) -> str:
    """A type, as it is written in the source, in words."""
    if hint.startswith("dict"):
        return "a mapping such as {role: name}"
    parts = [part for part in hint.split(" | ") if part != "None"]
    null = " or null" if "None" in hint.split(" | ") else ""
    if hint.startswith("list"):
        return f"a list such as [a, b]{null if hint.endswith('None') else ''}"
    if {"int", "float"} <= set(parts):
        return f"a number: a share of the run below 1, or steps{null}"
    words = " or ".join(word for part in parts if (word := WORDS.get(part, "")))
    return words + null if words else ""


def _by_value(defaults: Mapping[str, Any]) -> str:
    values: dict[str, list[str]] = {}
    for part, value in defaults.items():
        values.setdefault(shown(value), []).append(part)
    return "; ".join(f"{value} of {', '.join(parts)}" for value, parts in values.items())


def _lines(key: str, text: str) -> list[str]:
    indent = " " * 12
    first = f"  {key:<10}" if key else "  "
    more = indent if key else "  "
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=more)
