"""ALoRA's allocator (Liu et al., NAACL 2024, arXiv 2403.16187): on budget from the start, ranks change places."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.growth import hand_out, module_means
from dora_cli.allocation.schedules import Schedule, Window
from dora_cli.allocation.select import ranking
from dora_cli.allocation.table import UnitTable


@dataclass
class PruneAndReallocate(Allocator):
    """Each round closes the ``n`` worst ranks; modules that lost none share as many new ones, the best first.

    They share evenly; what is left over goes to the highest mean scores. Where every module lost one, nothing is added,
    as in the paper. Under a budget of parameters new ranks cost no more than what was closed.
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
        self.round: dict[str, Any] = {}  # the record of the round just done

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        return self.on_budget(table, target)

    def restores(self, count: int, modules: int) -> bool:
        """Not where every module may lose one in the same round."""
        return self._moving(count) < modules

    def window(self, schedule: Schedule, total: int) -> Window:
        """The schedule's, ended by the last round: from then on nothing moves, and evaluations count."""
        window, between = schedule.window(total), self.steps_between(total)
        first_round = window.start or between  # there is no step 0
        return replace(window, end=max(1, min(window.end, first_round + (self.rounds - 1) * between)))

    def act(self, event: Event) -> None:
        table, scores = event.table, event.scores()
        means = module_means(table, scores)
        known = {name: mean for name, mean in zip(table.names, means, strict=True) if mean > -torch.inf}
        self.round = {"scores": known}
        ranked = ranking(table, scores, table.alive)
        n = min(self._moving(len(ranked)), len(ranked) - 1)
        if n < 1:
            return
        closing = torch.zeros(len(table), dtype=torch.bool)
        closing[ranked[-n:]] = True
        losers = set(table.module[closing].tolist())
        winners = sorted((m for m in range(len(means)) if m not in losers), key=lambda m: (-means[m], m))
        table.drop(closing)
        left = event.limit - table.alive_cost() if event.by_cost else n
        for module, gained in hand_out(table, winners, left, by_cost=event.by_cost).items():
            table.grow(module, gained, event.optimizer)

    def _moving(self, count: int) -> int:
        return self.n or max(1, count // 8)

    def report(self, table: UnitTable) -> dict[str, Any]:
        """The round's mean score of every module, before ranks moved; not comparable between rounds."""
        return self.round
