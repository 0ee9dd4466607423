"""No allocation: the budget is spread evenly at the start and never moves."""

from dataclasses import dataclass
from typing import ClassVar

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.schedules import Window
from dora_cli.allocation.table import UnitTable


@dataclass
class NoAllocator(Allocator):
    units: ClassVar[frozenset[str]] = frozenset({"components", "tensors", "modules", "none"})
    mode: ClassVar[str] = "static"
    scores: ClassVar[bool] = False

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        return len(table), len(table)

    def is_event(self, step: int, window: Window) -> bool:
        return False

    def act(self, event: Event) -> None:
        pass
