"""Which combinations of parts are valid: exactly those where needs ⊆ provides (DESIGN 1)."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from dora_cli.adapters import ADAPTERS
from dora_cli.allocation import ALLOCATORS, IMPORTANCES, REGULARIZERS
from dora_cli.errors import UserError
from dora_cli.registry import load

LOOP = frozenset({"weights", "gradients", "probe"})  # what every training loop provides


def check(adapter: Any, importance: Any, schedule: Any, allocator: Any, regularizer: Any, names: dict[str, str]) -> str:
    """Refuse a combination that cannot work, saying why and what would.

    Args:
        adapter, importance, schedule, allocator, regularizer: parts, as classes or instances.
        names: group → chosen name, for the messages.

    Returns:
        The kind of unit that is allocated.

    Raises:
        UserError: a part needs what the others do not provide.
    """
    for group, part, table in (
        ("importance", importance, IMPORTANCES),
        ("allocator", allocator, ALLOCATORS),
        ("regularizer", regularizer, REGULARIZERS),
    ):
        others = allocator.units if group != "allocator" and set(adapter.units) & allocator.units else None
        _check_part(adapter, group, part, table, names, others or frozenset(adapter.units))
    kind = next((k for k in adapter.units if k in importance.units & allocator.units & regularizer.units), None)
    if kind is None and set(adapter.units) & importance.units & allocator.units:
        raise UserError(
            f"allocator={names['allocator']} and regularizer={names['regularizer']} do not go together",
            where=f"{names['allocator']} works on {_either(allocator.units)}, {names['regularizer']} on "
            f"{_either(regularizer.units)}",
            hint="use regularizer=none",
        )
    if kind is None:
        raise UserError(
            f"allocator={names['allocator']} and importance={names['importance']} do not go together",
            where=f"{names['allocator']} works on {_either(allocator.units)}, {names['importance']} on "
            f"{_either(importance.units)}",
            hint=f"with allocator={names['allocator']}: importance="
            + " or ".join(n for n in _fitting(IMPORTANCES, adapter, allocator.units) if n != "none"),
        )
    missing = allocator.verbs - _verbs(adapter, kind)
    if missing:
        able = [n for n in ADAPTERS if allocator.verbs <= _verbs(load(ADAPTERS, n, key="adapter"), kind)]
        raise UserError(
            f"adapter={names['adapter']} allocator={names['allocator']} do not go together",
            where=f"the allocator needs to {', '.join(sorted(missing))} units, which this adapter cannot",
            hint=f"adapters that can: {', '.join(able)}",
        )
    _check_scores(adapter, importance, allocator, names)
    _check_schedule(schedule, allocator, names)
    return kind


def check_base(adapter: Any, quantization: str, names: dict[str, str]) -> None:
    """Refuse an adapter that cannot rest on a base with packed weights.

    Args:
        quantization: how the base is packed, as the user said it.

    Raises:
        UserError: saying why, and which adapters can.
    """
    if adapter.no_packed_base:
        able = [name for name in ADAPTERS if not load(ADAPTERS, name, key="adapter").no_packed_base]
        raise UserError(
            f"adapter={names['adapter']} does not go with a quantised base ({quantization})",
            where=adapter.no_packed_base,
            hint=f"take a base that is not quantised, or one of adapter={', '.join(able)}",
        )


def combinations() -> Iterator[tuple[dict[str, str], str | UserError]]:
    """Every adapter × importance × allocator with the unit it allocates, or why it is refused.

    The schedule is one that the allocator accepts, the regularizer none.
    """
    from dora_cli.allocation.regularizers.none import NoRegularizer
    from dora_cli.allocation.schedules import Constant, CubicLate

    for a, i, l in product(ADAPTERS, IMPORTANCES, ALLOCATORS):  # noqa: E741
        names = {"adapter": a, "importance": i, "allocator": l, "schedule": "", "regularizer": "none"}
        allocator = load(ALLOCATORS, l, key="allocator")
        schedule = Constant if allocator.mode == "constant" or not allocator.scores else CubicLate
        parts = load(ADAPTERS, a, key="adapter"), load(IMPORTANCES, i, key="importance"), schedule, allocator
        try:
            yield names, check(*parts, NoRegularizer, names)
        except UserError as error:
            yield names, error


def _check_part(
    adapter: Any, group: str, part: Any, table: dict[str, str], names: dict[str, str], usable: frozenset[str]
) -> None:
    """Refuse an importance, allocator or regularizer that finds no units, or not what it needs, in the adapter.

    ``usable`` are the units that what is suggested instead may work on.
    """
    if set(adapter.units) & part.units:
        lacking = part.needs - LOOP - adapter.provides
        if not lacking:
            return
        where = f"{group}={names[group]} needs {_either(lacking)}, which this adapter does not have"
    else:
        where = f"{group}={names[group]} works on {_either(part.units)}, {_has(adapter, names)}"
    raise UserError(
        f"adapter={names['adapter']} {group}={names[group]} do not go together",
        where=where,
        hint=f"with adapter={names['adapter']}: {group}="
        + " or ".join(n for n in _fitting(table, adapter, usable) if n != names[group])
        + getattr(part, "instead", "")
        + getattr(adapter, "instead", ""),
    )


def _check_scores(adapter: Any, importance: Any, allocator: Any, names: dict[str, str]) -> None:
    if allocator.scores and names["importance"] == "none":
        raise UserError(
            f"allocator={names['allocator']} needs scores, but importance=none gives none",
            hint=f"with adapter={names['adapter']}: importance="
            + " or ".join(n for n in _fitting(IMPORTANCES, adapter, allocator.units) if n != "none"),
        )
    if allocator.turns and importance.remembers and names["importance"] != "none":
        able = [n for n in _fitting(IMPORTANCES, adapter, allocator.units) if n != "none"]
        raise UserError(
            f"allocator={names['allocator']} and importance={names['importance']} do not go together",
            where="components are others after each event, and these scores rest on what they were before",
            hint="use importance="
            + " or ".join(n for n in able if not load(IMPORTANCES, n, key="importance").remembers),
        )
    if not allocator.scores and names["importance"] != "none":
        raise UserError(
            f"importance={names['importance']} would be read by nobody: allocator={names['allocator']} chooses nothing",
            hint="use importance=none, or an allocator such as allocator=prune",
        )


def _check_schedule(schedule: Any, allocator: Any, names: dict[str, str]) -> None:
    if schedule.moves and allocator.mode == "constant":
        raise UserError(
            f"allocator={names['allocator']} keeps one total throughout, schedule={names['schedule']} changes it",
            hint="use schedule=constant (schedule.start and schedule.end say when ranks may move)",
        )
    if not schedule.moves and allocator.scores and allocator.mode != "constant":
        raise UserError(
            f"allocator={names['allocator']} follows a schedule, but schedule={names['schedule']} never moves",
            hint="choose another schedule, such as schedule=cubic_late",
        )
    if schedule.finds_budget and allocator.scores and not allocator.tries:
        able = [name for name in ALLOCATORS if load(ALLOCATORS, name, key="").tries]
        raise UserError(
            f"allocator={names['allocator']} and schedule={names['schedule']} do not go together",
            where=f"schedule={names['schedule']} cuts on trial and puts back what is missed",
            hint=f"use allocator={' or '.join(able)}, or set a budget and another schedule, such as cubic_late",
        )
    if schedule.moves and not allocator.scores:
        raise UserError(
            f"schedule={names['schedule']} needs an allocator that carries it out, but allocator=none acts on nothing",
            hint="use schedule=constant, or an allocator such as allocator=prune",
        )


def _verbs(adapter: Any, kind: str) -> frozenset[str]:
    """What may be done with units of this kind; modules can be switched and frozen whatever they are made of."""
    if kind not in adapter.units:
        return frozenset()
    return frozenset({"silence", "freeze", "thaw"}) if kind == "modules" else adapter.verbs


def _has(adapter: Any, names: dict[str, str]) -> str:
    units = [unit for unit in adapter.units if unit != "none"]
    return f"this adapter's are {' or '.join(units)}" if units else f"adapter={names['adapter']} has no units"


def _either(words: frozenset[str]) -> str:
    return " or ".join(sorted(words - {"none"}))


def _fitting(table: dict[str, str], adapter: Any, units: frozenset[str]) -> list[str]:
    parts = {name: load(table, name, key="") for name in table}
    return [n for n, p in parts.items() if set(adapter.units) & units & p.units and p.needs - LOOP <= adapter.provides]
