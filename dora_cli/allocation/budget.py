"""The budget: what must be left at the end, as the user says it and as a number (DESIGN 3)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dora_cli.errors import UserError

FORMS = "a share of the start in (0, 1) such as 0.1, adapter parameters such as 340k, or an average rank such as r4"
SUFFIXES = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
PAPER_RATIO = 1.5  # start rank over the final average (METHODS 2.1)
MOST = 1e15  # more than any model has


@dataclass(frozen=True)
class Budget:
    """A parsed budget. ``kind`` is ``share``, ``params`` or ``average``; ``text`` is what stands in folder names."""

    kind: str
    value: float
    text: str

    def start_rank(self, costs: Sequence[int], ratio: float = PAPER_RATIO) -> int | None:
        """ceil(``ratio`` × the average rank asked for); None for a share."""
        if self.kind == "share":
            return None
        average = self.value / (sum(costs) if self.kind == "params" else 1)
        return math.ceil(round(ratio * average, 9))  # 1.1 × 10 is a little above 11


@dataclass(frozen=True)
class Target:
    """The final budget of one run: a number of components, or of parameters where ``by_cost``."""

    limit: int
    by_cost: bool


def parse_budget(value: object) -> Budget | None:
    """Read ``budget=``.

    Raises:
        UserError: not one of the three forms, or out of range.
    """
    if value is None:
        return None
    text = str(value).strip()
    match = re.fullmatch(r"(r)?(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)([kmb])?", text.lower())
    if isinstance(value, bool) or not match or (match[1] and match[3]):
        percent = re.fullmatch(r"(\d+\.?\d*|\.\d+)%", text)
        share = float(percent[1]) / 100 if percent else 0.0
        raise UserError(
            f"cannot read budget={value}", hint=f"say budget={share:g}" if 0 < share < 1 else f"say {FORMS}"
        )
    number = float(match[2]) * SUFFIXES[match[3] or ""]
    if number >= MOST:
        raise UserError(f"budget={value} is out of range", hint=f"say {FORMS}")
    if match[1]:
        if number <= 0:
            raise UserError(f"budget={value} asks for an average rank of nothing", hint="say for example budget=r4")
        return Budget("average", number, text)
    whole = (number.is_integer() and number > 1) or match[3]
    if whole and number >= 1:
        return Budget("params", round(number), text)
    if 0 < number < 1 and not match[3]:  # 0.0005k is half a parameter, not a half
        return Budget("share", number, text)
    raise UserError(f"budget={value} is out of range", hint=f"say {FORMS}")


def resolve(budget: Budget, costs: Sequence[int], start_rank: int | None, *, shrinks: bool) -> Target:
    """What ``budget`` comes to for modules whose components cost ``costs`` each.

    Args:
        budget: as parsed.
        costs: parameters of one component, per target module, in module order.
        start_rank: components of each module at the start, where the method has such a start.
        shrinks: whether the method starts above the budget, so that the start limits it.

    Raises:
        UserError: a share without a start rank, a budget above the start, or one that keeps nothing.
    """
    n = len(costs)
    if budget.kind == "params":
        target = Target(round(budget.value), by_cost=True)
    elif budget.kind == "average":
        target = Target(round(budget.value * n), by_cost=False)
    elif start_rank is None:
        raise UserError(
            f"budget={budget.text} is a share of the starting components, but adapter.rank is not set",
            hint="set adapter.rank, or say the budget as an average rank such as budget=r4",
        )
    else:
        target = Target(round(budget.value * n * start_rank), by_cost=False)
    if target.limit < (min(costs) if target.by_cost else 1):
        rank_meant = f"for an average rank of {budget.text} say budget=r{budget.text}"
        raise UserError(
            f"budget={budget.text} keeps no component at all",
            where=f"{n} modules; the cheapest component has {min(costs):,} parameters",
            hint=rank_meant if target.by_cost else "raise the budget",
        )
    if shrinks and start_rank is not None:
        _refuse_growth(budget, target, costs, start_rank)
    return target


def check_reachable(
    budget: Budget, mode: str, rank: int | None, *, floor: int = 0, first: int = 1, method: str = ""
) -> None:
    """Refuse what no model could make possible, before one is loaded.

    Args:
        budget: as parsed.
        mode: how the allocator meets a budget (``shrink``, ``grow``, ``constant``, ``static``).
        rank: ``adapter.rank`` where it is set: what a share is a share of, and where a shrinking method starts.
        floor: components that every module keeps.
        first: components of each module from which a growing method starts.
        method: its name, for the message.

    Raises:
        UserError: a growing method asked for no more than its start, a shrinking one for more than its start, or a
            budget below the least that every module keeps.
    """
    average = {"average": budget.value, "share": budget.value * rank if rank else None}.get(budget.kind)
    if average is None:
        return
    if mode == "grow" and average <= first:
        raise UserError(
            f"budget={budget.text} is no more than the adapter starts with (allocator.start_rank={first})",
            where=f"method={method} grows towards its budget, and this one is an average rank of {average:g}",
            hint="raise the budget",
        )
    if mode == "shrink" and rank and average > rank:
        raise UserError(
            f"budget={budget.text} asks for more than the adapter starts with (adapter.rank={rank})",
            where="there is nothing to prune",
            hint="raise adapter.rank, or set a smaller budget",
        )
    if average < floor:
        raise UserError(
            f"budget={budget.text} keeps {average:g} components a module, and each must keep {floor} at least",
            hint="raise the budget, or lower allocator.min_rank where the method allows it",
        )


def spread(target: Target, costs: Sequence[int]) -> list[int]:
    """Ranks per module for a method that never moves them: even, the remainder in module order (DESIGN 3)."""
    ranks = [0] * len(costs)
    if not target.by_cost:
        return [target.limit // len(costs) + (m < target.limit % len(costs)) for m in range(len(costs))]
    left = target.limit
    full_rounds = left // sum(costs)
    ranks, left = [full_rounds] * len(costs), left - full_rounds * sum(costs)
    for m, cost in enumerate(costs):
        if cost > left:
            break  # the largest prefix that fits
        ranks[m], left = ranks[m] + 1, left - cost
    return ranks


def _refuse_growth(budget: Budget, target: Target, costs: Sequence[int], start_rank: int) -> None:
    start = start_rank * (sum(costs) if target.by_cost else len(costs))
    if target.limit > start:
        what = "parameters" if target.by_cost else "components"
        raise UserError(
            f"budget={budget.text} asks for more than the adapter starts with (adapter.rank={start_rank})",
            where=f"there is nothing to prune: {len(costs)} modules × rank {start_rank} = {start:,} {what}, and "
            f"{budget.text} keeps {target.limit:,}",
            hint="raise adapter.rank, or set a smaller budget",
        )
