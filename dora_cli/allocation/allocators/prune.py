"""Global top-K: all units compete in one ranking over all modules, and exactly K(t) live (METHODS 2.5, DESIGN 6)."""

from dataclasses import dataclass, field
from typing import ClassVar

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import PAPER_RATIO
from dora_cli.allocation.select import top


@dataclass
class Prune(Allocator):
    """With ``revive`` what is pruned before the end is silenced, stays in the ranking and may earn its place back."""

    interval: int | float = field(
        default=10, metadata={"help": "steps between events, or a share of the run", "above": 0}
    )
    revive: bool = field(default=True, metadata={"help": "pruned components may return before the end"})
    min_rank: int = field(default=0, metadata={"help": "components that each module keeps at least", "low": 0})

    start_ratio: float = field(
        default=PAPER_RATIO,
        metadata={"help": "start rank over the average asked for, where adapter.rank is null", "low": 1.0},
    )
    cost_aware: bool = field(
        default=False, metadata={"help": "where the budget counts parameters, rank by score per parameter"}
    )

    verbs: ClassVar[frozenset[str]] = frozenset({"silence", "drop"})
    tries: ClassVar[bool] = True

    def act(self, event: Event) -> None:
        self.prepare(event)
        keep = top(event.table, event.scores(), event.limit, by_cost=event.by_cost, min_rank=self.min_rank)
        event.table.keep(keep, final=event.final or not self.revive)
