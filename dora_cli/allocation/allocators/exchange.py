"""ElaLoRA's allocator (Chang et al. 2025, arXiv 2504.00254): one total throughout, ranks change places."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.growth import hand_out
from dora_cli.allocation.select import ranking
from dora_cli.allocation.table import UnitTable


@dataclass
class Exchange(Allocator):
    """Each module nominates its ``nominees`` worst components; of these the worst move to the owners of the best.

    b(t) = round(moves · (1 − x³)) components move at an event, x the position in the window: many at first, none at
    the end (METHODS 10). No module nominates all it has, so none is ever emptied. Under a budget of parameters
    what is left over from moves to cheaper modules goes to those that gain next.
    """

    interval: int | float = field(
        default=50, metadata={"help": "steps between events, or a share of the run", "above": 0}
    )
    moves: int = field(default=4, metadata={"help": "components that move at the first event", "low": 1})
    nominees: int = field(default=2, metadata={"help": "components that each module puts up at an event", "low": 1})

    verbs: ClassVar[frozenset[str]] = frozenset({"drop", "grow"})
    mode: ClassVar[str] = "constant"
    grows: ClassVar[bool] = True

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        return self.on_budget(table, target)

    def act(self, event: Event) -> None:
        table = event.table
        pool = self._pool(table, event.scores())
        moves = min(round(self.moves * (1 - event.window.x(event.step) ** 3)), len(pool) // 2)
        if moves < 1:
            return
        closing = torch.zeros(len(table), dtype=torch.bool)
        closing[pool[-moves:]] = True
        gaining = table.module[pool[:moves]].tolist()
        table.drop(closing)
        left = event.limit - (table.alive_cost() if event.by_cost else table.alive_count())
        for module, n in hand_out(table, gaining, left, by_cost=event.by_cost).items():
            table.grow(module, n, event.optimizer)

    def _pool(self, table: UnitTable, scores: Tensor) -> Tensor:
        """The nominees of all modules, best first: each module's worst, but never all that it has."""
        ranked = ranking(table, scores, table.alive)
        nominated = torch.zeros(len(ranked), dtype=torch.bool)
        for module in table.module[ranked].unique().tolist():
            mine = torch.nonzero(table.module[ranked] == module).flatten()
            nominated[mine[1:][-self.nominees :]] = True
        return ranked[nominated]
