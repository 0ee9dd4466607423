"""ALoRA's allocator (Liu et al., NAACL 2024, arXiv 2403.16187): on budget from the start, ranks move between modules.

Its full form (cheaper proxies, gate variants) belongs to the methods issue; this is the procedure of METHODS 5.
"""

from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import ClassVar

import torch

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.schedules import Schedule, Window
from dora_cli.allocation.select import ranking
from dora_cli.allocation.table import UnitTable


@dataclass
class PruneAndReallocate(Allocator):
    """Each round closes the ``n`` worst ranks; modules that lost none share as many new ones, the best first.

    Where every module lost one, nothing is added, as in the paper. Under a budget of parameters new ranks cost no more
    than what was closed.
    """

    interval: int | float = field(
        default=0.05, metadata={"help": "steps between rounds, or a share of the run", "above": 0}
    )
    n: int | None = field(
        default=None, metadata={"help": "ranks that move in a round; null: an eighth, the paper's share", "low": 1}
    )
    rounds: int = field(default=8, metadata={"help": "rounds at most", "low": 1})

    verbs: ClassVar[frozenset[str]] = frozenset({"drop", "grow"})
    mode: ClassVar[str] = "constant"
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.by_cost = False

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        self.by_cost = target is not None and target.by_cost
        return len(table), len(table)

    def window(self, schedule: Schedule, total: int) -> Window:
        """The schedule's, ended by the last round: from then on nothing moves, and evaluations count."""
        window = schedule.window(total)
        last_round = window.start + (self.rounds - 1) * self.steps_between(total)
        return replace(window, end=max(1, min(window.end, last_round)))

    def act(self, event: Event) -> None:
        table, scores = event.table, event.scores()
        ranked = ranking(table, scores, table.alive)
        n = min(self.n or max(1, len(ranked) // 8), len(ranked) - 1)
        if n < 1:
            return
        closing = torch.zeros(len(table), dtype=torch.bool)
        closing[ranked[len(ranked) - n :]] = True
        losers = set(table.module[closing].tolist())
        mean = {
            m: float(scores[(table.module == m) & table.alive].mean()) if count else -torch.inf
            for m, count in enumerate(table.ranks().values())
            if m not in losers
        }
        freed = int(table.cost[closing].sum()) if self.by_cost else n
        table.drop(closing)
        for m, share in self._shares(table, sorted(mean, key=lambda m: (-mean[m], m)), freed).items():
            table.grow(m, share, event.optimizer)

    def _shares(self, table: UnitTable, winners: list[int], freed: int) -> dict[int, int]:
        """New ranks per module: in turn, best first, while what was freed lasts and a module has room (full rank)."""
        ranks = list(table.ranks().values())
        cost = {m: table.layers[m].d_in + table.layers[m].d_out if self.by_cost else 1 for m in winners}
        room = {m: min(table.layers[m].d_in, table.layers[m].d_out) - ranks[m] for m in winners}
        shares: dict[int, int] = {}
        idle = 0
        for m in cycle(winners):
            if idle == len(winners):
                break
            if room[m] > 0 and cost[m] <= freed:
                shares[m] = shares.get(m, 0) + 1
                room[m], freed, idle = room[m] - 1, freed - cost[m], 0
            else:
                idle += 1
        return shares
