"""Which combinations of parts are valid: exactly those where needs ⊆ provides (DESIGN 1)."""

from typing import Any

from dora_cli.adapters import ADAPTERS
from dora_cli.allocation import ALLOCATORS, IMPORTANCES, REGULARIZERS
from dora_cli.errors import UserError
from dora_cli.registry import load


def check(
    adapter: Any, importance: Any, schedule: Any, allocator: Any, regularizer: Any, names: dict[str, str]
) -> None:
    """Refuse a combination that cannot work, saying why and what would.

    Args:
        adapter, importance, schedule, allocator, regularizer: parts, as classes or instances.
        names: group → chosen name, for the messages.

    Raises:
        UserError: a part needs what the others do not provide.
    """
    for group, part, table in (
        ("importance", importance, IMPORTANCES),
        ("allocator", allocator, ALLOCATORS),
        ("regularizer", regularizer, REGULARIZERS),
    ):
        if adapter.units not in part.units:
            raise UserError(
                f"adapter={names['adapter']} {group}={names[group]} do not go together",
                where=f"{group}={names[group]} works on {' or '.join(sorted(part.units))}, {_has(adapter, names)}",
                hint=f"with adapter={names['adapter']}: {group}=" + " or ".join(_fitting(table, adapter)),
            )
    missing = allocator.verbs - adapter.verbs
    if missing:
        raise UserError(
            f"adapter={names['adapter']} allocator={names['allocator']} do not go together",
            where=f"the allocator needs to {', '.join(sorted(missing))} units, which this adapter cannot",
            hint="adapters that can: "
            + ", ".join(name for name in ADAPTERS if allocator.verbs <= load(ADAPTERS, name, key="adapter").verbs),
        )
    if allocator.scores and names["importance"] == "none":
        raise UserError(
            f"allocator={names['allocator']} needs scores, but importance=none gives none",
            hint=f"with adapter={names['adapter']}: importance="
            + " or ".join(n for n in _fitting(IMPORTANCES, adapter) if n != "none"),
        )
    if not allocator.scores and names["importance"] != "none":
        raise UserError(
            f"importance={names['importance']} would be read by nobody: allocator={names['allocator']} chooses nothing",
            hint="use importance=none, or an allocator such as allocator=prune",
        )
    if schedule.moves and allocator.mode == "constant":
        raise UserError(
            f"allocator={names['allocator']} keeps one total throughout, schedule={names['schedule']} changes it",
            hint="use schedule=constant (schedule.start and schedule.end say when ranks may move)",
        )
    if not schedule.moves and allocator.mode == "shrink":
        raise UserError(
            f"allocator={names['allocator']} shrinks, but schedule={names['schedule']} never does",
            hint="choose another schedule, such as schedule=cubic_late",
        )
    if schedule.moves and not allocator.scores:
        raise UserError(
            f"schedule={names['schedule']} needs an allocator that carries it out, but allocator=none acts on nothing",
            hint="use schedule=constant, or an allocator such as allocator=prune",
        )


def _has(adapter: Any, names: dict[str, str]) -> str:
    return (
        f"adapter={names['adapter']} has no units" if adapter.units == "none" else f"this adapter's are {adapter.units}"
    )


def _fitting(table: dict[str, str], adapter: Any) -> list[str]:
    return [name for name in table if adapter.units in load(table, name, key="").units]
