"""Choices by name: plain dictionaries of ``name → "module:attribute"`` and the one way a wrong name fails.

Listing the names of a table imports nothing, so help and near-name answers stay fast.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from dora_cli.errors import UserError


def near(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The up to ``n`` names most like ``name``, best first."""
    return get_close_matches(name, list(names), n=n, cutoff=0.5)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint for a mistyped name: its neighbours where there are any, and every choice."""
    names = sorted(names)
    close = near(name, names)
    listing = ", ".join(names) if len(names) <= 30 else ", ".join(names[:30]) + ", …"
    guess = "did you mean " + " or ".join(f"'{c}'" for c in close) + "?   " if close else ""
    return f"{guess}(all: {listing})"


def load(table: Mapping[str, str], name: str, *, key: str) -> Any:
    """Import and return the object that ``table`` holds under ``name``.

    Args:
        table: ``name → "module:attribute"``.
        name: the choice.
        key: the key as the user types it, for the message.

    Raises:
        UserError: ``name`` is not in ``table``.
    """
    if name not in table:
        raise UserError(f"unknown {key} '{name}'", hint=did_you_mean(name, table))
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)


PART_TABLES = {
    "adapter": "dora_cli.adapters:ADAPTERS",
    "importance": "dora_cli.allocation:IMPORTANCES",
    "schedule": "dora_cli.allocation:SCHEDULES",
    "allocator": "dora_cli.allocation:ALLOCATORS",
    "regularizer": "dora_cli.allocation:REGULARIZERS",
}


def part_table(group: str) -> dict[str, str]:
    """The table of a group of parts; importing it imports nothing else. Empty for any other group."""
    table: dict[str, str] = load(PART_TABLES, group, key="group") if group in PART_TABLES else {}
    return table
