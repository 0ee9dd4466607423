"""Command-line overrides: what the user typed, made into what Hydra's grammar means by it.

Hydra reads ``a=b`` in a value as a syntax error, ``a,b`` as a sweep and ``\\(`` as an escape. Here a value of a text
key is the text as typed, and so is any other value that Hydra reads as plain text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from os.path import expanduser, isfile
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Quote, QuotedString, RangeSweep, Transformer
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.errors import HydraException

from dora_cli.config.check import Key, find_key
from dora_cli.config.recipes import GROUPS, choices
from dora_cli.errors import UserError

PATH_KEYS = ("out", "data.path", "adapter.init_from")
NAME = re.compile(r"[A-Za-z_][\w/-]*(\.[A-Za-z_][\w-]*)*", re.ASCII)
SIMPLE = re.compile(r"[A-Za-z_][\w./-]*")


@dataclass(frozen=True)
class Override:
    """``key=value`` from the command line: the value in Python, and the line to hand to Hydra."""

    key: str
    value: Any
    line: str


def parse(arguments: Iterable[str], keys: Mapping[str, Key]) -> list[Override]:
    """Read overrides for one run. Where a key comes twice, the last one counts.

    Raises:
        UserError: not ``key=value``, an unknown key, a value that asks for several runs.
    """
    parsed: dict[str, Override] = {}
    for argument in arguments:
        key, text = split(argument)
        if key in GROUPS:
            parsed[key] = _choice(key, text)
            continue
        known = find_key(key, keys)
        # A new key below a mapping (data.columns.text) needs Hydra's ++ in a strict configuration.
        prefix = "++" if known.is_free or key not in keys else ""
        value, grammar = _value(known, text)
        parsed[key] = Override(key, value, f"{prefix}{key}={grammar}")
    return list(parsed.values())


def split(argument: str) -> tuple[str, str]:
    """Key and value of ``key=value``, ``+key=value`` or ``++key=value``.

    Raises:
        UserError: anything else.
    """
    key, equals, text = argument.partition("=")
    if key.startswith("~"):
        raise UserError(f"'{argument}': keys cannot be removed", hint=f"{key[1:]}=null takes the default")
    if not equals:
        guess = f"did you mean recipe={argument}?" if argument.endswith((".yaml", ".yml")) else "write key=value"
        raise UserError(f"'{argument}' is not key=value", hint=guess)
    name = re.sub(r"^\+{1,2}", "", key).strip()
    if not NAME.fullmatch(name):
        raise UserError(f"cannot read '{argument}'", hint="write key=value, for example train.epochs=3")
    if not text.strip():
        raise UserError(f"{name}= has no value", hint=None if name in GROUPS else f"write {name}=null for none")
    return name, text


def _choice(group: str, text: str) -> Override:
    name = text.strip()
    if is_quoted(name):
        name = name[1:-1]
    elif "," in name and not isfile(expanduser(name)):
        raise _several(group, name)
    return Override(group, name, f"{group}={quote(name)}")


def _value(key: Key, text: str) -> tuple[Any, str]:
    """The value of one run, and how to write it in Hydra's grammar."""
    if key.is_text and not is_quoted(text):
        if text.lower() == "null":
            return None, "null"
        if "," in text and not _is_literal(key.name, text):
            raise _several(key.name, text, may_be_one=True)
        return text, quote(text)
    override = _grammar(text)
    if override is None:  # not Hydra's grammar: a list of plain words, or text that the key's type accepts or refuses
        items = _plain_items(text) if key.is_open else []
        return (items, f"[{','.join(map(quote, items))}]") if items else (text, quote(text))
    if override.is_sweep_override():
        raise _several(key.name, text, may_be_one=key.is_open)
    value = override.value()
    if isinstance(value, str) and not is_quoted(text):
        return text, quote(text)
    return value, text


def _grammar(text: str) -> HydraOverride | None:
    try:
        return OverridesParser.create().parse_overrides([f"key={text}"])[0]
    except (HydraException, ValueError, RecursionError):  # endless digits, endless nesting
        return None


def _plain_items(text: str) -> list[str]:
    """The items of ``[<|user|>,don't know]``: with characters that Hydra's grammar does not take, and no structure."""
    text = text.strip()
    items = [item.strip() for item in text[1:-1].split(",")]
    odd = set("".join(items)) & set('[]{}"\\') or any(item[:1] == "'" for item in items)
    return items if (text[:1], text[-1:]) == ("[", "]") and all(items) and not odd else []


def _is_literal(name: str, text: str) -> bool:
    """Whether a comma in the value of a text key is part of the text rather than a list of runs."""
    return name in PATH_KEYS or name.startswith(("data.columns.", "data.splits.")) or bool(set(text) & set("/\\ "))


def _several(name: str, text: str, *, may_be_one: bool = False) -> UserError:
    hint = "-m makes one run of each" + (
        "; one list is [a,b], one text is 'a,b' (quoted for the shell)" if may_be_one else ""
    )
    return UserError(f"{name}={text} gives several values to one run", hint=hint)


def quote(text: str) -> str:
    """``text`` in Hydra's quotes, so that it is read as exactly that text."""
    return QuotedString(text, Quote.single).with_quotes()


def is_quoted(text: str) -> bool:
    """Whether the user put quotes around the whole value, which then means what Hydra says."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return False
    override = _grammar(text)
    return override is not None and not override.is_sweep_override()


# ---- sweeps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Numbers between two ends, both included; whole ones where both ends are; by ``log`` as many in each decade."""

    low: float
    high: float
    step: float | None = None
    log: bool = False


Values = list[str] | Interval


def parse_sweep(
    arguments: Iterable[str], keys: Mapping[str, Key], folders: Sequence[Path], *, search: bool = False
) -> tuple[list[str], dict[str, Values]]:
    """Read the overrides of a sweep (``-m``): ``a,b,c``, ``range(1,4)``, ``choice(a,b)``, ``glob(dora*)``.

    Keys that ``keys`` does not know are not refused here but by the run that gets them: the options of parts are known
    only once the parts are loaded.

    Args:
        arguments: the overrides.
        keys: the known keys.
        folders: where ``glob`` looks for names.
        search: give ``interval(0.1,1)`` and ranges as intervals, for who proposes values of his own.

    Returns:
        The overrides that all runs share, as typed, and for every swept key its values, as each run gets them.

    Raises:
        UserError: not ``key=value``, or a sweep that cannot be listed.
    """
    shared: dict[str, str] = {}
    axes: dict[str, Values] = {}
    for argument in arguments:
        name, text = split(argument)
        shared.pop(name, None)
        axes.pop(name, None)
        is_text = name in keys and keys[name].is_text
        values = sweep_values(name, text, is_text=is_text, folders=folders, search=search)
        if values is None:
            shared[name] = argument
        else:
            axes[name] = values
    return list(shared.values()), axes


def sweep_values(
    name: str, text: str, *, is_text: bool, folders: Sequence[Path], search: bool = False
) -> Values | None:
    """The values of one swept key, each as a run's command line takes it; None where there is only one value.

    Raises:
        UserError: an ``interval`` where a list is needed, one that is none, or a sweep without any value.
    """
    override = _grammar(text)
    if override is None and is_text and "," in text:  # Hydra cannot read it, but its commas are plain enough
        return [part if SIMPLE.fullmatch(part) else quote(part) for part in map(str.strip, text.split(","))]
    if override is None or not override.is_sweep_override():
        return None
    sweep: Any = override.value()
    interval = _interval(name, text, sweep) if search else None
    if interval is not None:
        return interval
    if isinstance(sweep, Glob):
        values = sweep.filter(list(choices(name, folders)))
    elif override.is_discrete_sweep():
        values = [str(value) for value in override.sweep_iterator(transformer=_as_argument)]
    else:
        hint = "use a,b,c or range(start,stop,step), or let hydra/sweeper=optuna search it"
        raise UserError(f"{name}={text} has no list of values", hint=hint)
    if not values:
        offered = ", ".join(choices(name, folders)) or "glob() chooses among recipes, methods, models, data and parts"
        raise UserError(f"{name}={text} names no value", hint=offered)
    return values


def _interval(name: str, text: str, sweep: Any) -> Interval | None:
    """What to search in; None for a list, and a range that is shuffled, falls or is empty."""
    if isinstance(sweep, RangeSweep):
        ends: Any = sweep  # whose numbers are optional by type alone
        count = ceil((ends.stop - ends.start) / ends.step) if not ends.shuffle else 0
        if count < 1 or ends.step < 0:
            return None
        return Interval(ends.start, ends.start + (count - 1) * ends.step, ends.step)
    if not isinstance(sweep, IntervalSweep):
        return None
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    assert low is not None and high is not None
    if low >= high or (log and low <= 0):
        hint = "write interval(low,high)" + (", above 0 where it is searched by log" if log else "")
        raise UserError(f"{name}={text} is no interval", hint=hint)
    return Interval(low, high, log=log)


def _as_argument(element: Any) -> str:
    if isinstance(element, str):
        return element if SIMPLE.fullmatch(element) else quote(element)
    return Transformer.str(element)
