"""What an allocator declares and does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from dora_cli.allocation.budget import Budget, Target
from dora_cli.allocation.schedules import Schedule, Window
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict
from dora_cli.errors import UserError


@dataclass
class Event:
    """All that an allocator may look at when it acts.

    ``limit`` is what may live after this event by the schedule, in units, or parameters where ``by_cost``; ``first``
    and ``last`` are its values at the start and the end. ``scores()`` asks the importance, once; ``elements()`` asks it
    for the scores within each unit; ``agree`` gives every process the numbers of one of them.
    """

    step: int
    final: bool
    limit: int
    first: int
    last: int
    by_cost: bool
    scores: Callable[[], Tensor]
    elements: Callable[[], list[Tensor]]
    table: UnitTable
    schedule: Schedule
    window: Window
    optimizer: Optimizer | None
    agree: Callable[[Tensor], Tensor] = lambda values: values


class Allocator:
    """Decides who lives. ``verbs`` are those it uses on units, ``units`` the kinds of unit it can act on, ``needs``
    what the adapter must provide.

    ``mode`` says how the budget is met: ``shrink`` from the start rank to it, ``grow`` from the start rank to it,
    ``constant`` on it throughout, ``static`` spread evenly and never moved.
    """

    verbs: ClassVar[frozenset[str]] = frozenset()
    units: ClassVar[frozenset[str]] = frozenset({"components"})
    needs: ClassVar[frozenset[str]] = frozenset()
    mode: ClassVar[str] = "shrink"
    scores: ClassVar[bool] = True  # whether it asks for scores
    compacts: ClassVar[bool] = True  # whether dropped units leave their tensors, and weigh nothing in clipping
    grows: ClassVar[bool] = False
    turns: ClassVar[bool] = False  # whether a component is another one after an event
    tries: ClassVar[bool] = False  # whether what it would prune next can be cut on trial (``schedule=auto``)

    interval: int | float = 1
    cost_aware: bool = False  # whether scores are ranked per parameter, where the budget counts parameters

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        """What the schedule counts from and to."""
        if target is None:
            raise UserError("this method works towards a budget, but none is set", hint="set for example budget=r8")
        return (table.alive_cost() if target.by_cost else table.alive_count()), target.limit

    def on_budget(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        """Bounds of an allocator that stays on its budget: in parameters where that is what the budget counts."""
        total = target.limit if target is not None and target.by_cost else len(table)
        return total, total

    def restores(self, count: int, modules: int) -> bool:
        """Whether as much opens as an event closes, of up to ``count`` units, for those that stay on their budget."""
        return True

    def attach(self, table: UnitTable) -> None:
        """Take hold of the table before the optimizer is built."""

    def check(self, learning_rate: float, schedule: Schedule, budget: Budget | None) -> None:
        """Refuse what cannot work at this peak rate, with this schedule and budget, before any model loads.

        Raises:
            UserError: naming the option.
        """

    def window(self, schedule: Schedule, total: int) -> Window:
        """The steps in which this allocator acts; the last one is the final choice.

        Raises:
            UserError: the schedule's window does not fit the run, or this allocator.
        """
        return schedule.window(total)

    def final_step(self, window: Window) -> int:
        """From which step on evaluations count: the final choice, or 0 where every moment is on budget anyway."""
        return window.end if self.mode != "static" else 0

    def steps_between(self, total: int) -> int:
        """``interval`` in steps, for a run of ``total``."""
        if isinstance(self.interval, float) and not self.interval.is_integer():
            if self.interval > 1:
                raise UserError(f"allocator.interval={self.interval} is neither a share below 1 nor whole steps")
            return max(1, int(self.interval * total))
        return int(self.interval)

    def is_event(self, step: int, window: Window) -> bool:
        """Events fall on start + k · interval and always on the end (DESIGN 6)."""
        if step == window.end:
            return True
        return window.start <= step < window.end and (step - window.start) % self.steps_between(window.total) == 0

    def observes(self, step: int, window: Window) -> bool:
        """Whether the importance looks at this step."""
        return step <= window.end

    def after_backward(self, table: UnitTable, step: int, window: Window) -> None:
        """Change gradients, at every step before clipping."""

    def after_step(self, table: UnitTable, step: int, window: Window, verdict: Verdict = TAKEN) -> None:
        """Change parameters, at every step after the optimizer's and before scores and events.

        Where the optimizer's was not taken, nothing may move on its account.
        """

    def prepare(self, event: Event) -> None:
        """Bring components into the form that is scored, before ``event.scores()``. Changes no output."""

    def act(self, event: Event) -> None:
        """Use the verbs."""
        raise NotImplementedError

    def report(self, table: UnitTable) -> dict[str, Any]:
        """What this allocator adds to the record of an event, for JSON."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What exact resume needs beside the table: tensors and plain numbers, one level deep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
