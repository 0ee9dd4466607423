"""What the allocators that reproduce published code share: they count components, and mask instead of removing."""

from typing import ClassVar, NoReturn

from dora_cli.allocation.allocators.base import Allocator
from dora_cli.allocation.budget import Budget, Target
from dora_cli.allocation.schedules import Schedule, Window
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError


class Masked(Allocator):
    """``name`` is that of the choice, for messages."""

    name: ClassVar[str]
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
                f"allocator={self.name} counts components, and the budget counts parameters",
                hint="say the budget as an average rank such as budget=r4, or use allocator=prune",
            )

    def _refuse(self, schedule: Schedule) -> NoReturn:
        raise UserError(
            f"allocator={self.name} needs schedule.start={schedule.start} before schedule.end={schedule.end}",
            hint="its budget falls between the two; allocator=prune can do with one event",
        )
