"""DoRA's pruning as its official code does it, quirks included (METHODS 2.5, 2.7, 2.9). For reproduction only."""

from dataclasses import dataclass, field
from typing import ClassVar, NoReturn

import torch

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Budget, Target
from dora_cli.allocation.schedules import Schedule, Window
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError


@dataclass
class PruneOfficial(Allocator):
    """Prunes ``max(int(N · share · x³), 1)`` components and whatever ties with the last; masks, never compacts."""

    interval: int = field(default=10, metadata={"help": "steps between events", "low": 1})

    verbs: ClassVar[frozenset[str]] = frozenset({"silence", "drop"})
    compacts: ClassVar[bool] = False

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        self._check_kind(target is not None and target.by_cost)
        return super().bounds(table, target)

    def check(self, learning_rate: float, schedule: Schedule, budget: Budget | None) -> None:
        self._check_kind(budget is not None and budget.kind == "params")
        if type(schedule.start) is type(schedule.end) and schedule.start >= schedule.end:
            self._refuse(schedule)

    def window(self, schedule: Schedule, total: int) -> Window:
        window = schedule.window(total)
        if window.start >= window.end:
            self._refuse(schedule)
        return window

    def _check_kind(self, in_parameters: bool) -> None:
        if in_parameters:
            raise UserError(
                "allocator=prune_official counts components, and the budget counts parameters",
                hint="say the budget as an average rank such as budget=r4, or use allocator=prune",
            )

    def _refuse(self, schedule: Schedule) -> NoReturn:
        raise UserError(
            f"allocator=prune_official needs schedule.start={schedule.start} before schedule.end={schedule.end}",
            hint="its budget falls between the two; allocator=prune can do with one event",
        )

    def is_event(self, step: int, window: Window) -> bool:
        """``int(t − start)`` truncates towards 0, so the first event may come a step early (2.9, row 13)."""
        if step == window.end:
            return True
        offset = step - window.start_exact
        return offset > -1 and step < window.end and int(offset) % self.interval == 0

    def act(self, event: Event) -> None:
        window, n = event.window, event.first
        # The code's x is not rounded to steps, and it reaches 1 only where the window's end is a whole step.
        x = (event.step - window.start_exact) / (window.end_exact - window.start_exact)
        share = event.schedule.share(min(max(x, 0.0), 1.0), n, event.last)
        n_pruned = max(int(n * ((n - event.last) / n) * share), 1)
        scores = event.scores()
        threshold = torch.kthvalue(scores, n_pruned).values
        event.table.keep(scores > threshold, final=event.final)
