"""ALoRA's allocator (Liu et al., NAACL 2024, arXiv 2403.16187): on budget from the start, ranks move between modules.

Its full form (cheaper proxies, gate variants) belongs to the methods issue; this is the procedure of METHODS 5.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.schedules import Window
from dora_cli.allocation.select import ranking
from dora_cli.allocation.table import UnitTable


@dataclass
class PruneAndReallocate(Allocator):
    """Each round closes the ``n`` worst ranks; modules that lost none share as many new ones, the best first."""

    interval: int | float = field(
        default=0.05, metadata={"help": "steps between rounds, or a share of the run", "above": 0}
    )
    n: int | None = field(default=None, metadata={"help": "ranks that move in a round; null: one per module", "low": 1})
    rounds: int = field(default=8, metadata={"help": "rounds at most", "low": 1})

    verbs: ClassVar[frozenset[str]] = frozenset({"drop", "grow"})
    mode: ClassVar[str] = "constant"
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.done = 0

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        return len(table), len(table)

    def is_event(self, step: int, window: Window) -> bool:
        return self.done < self.rounds and super().is_event(step, window)

    def act(self, event: Event) -> None:
        self.done += 1
        table, scores = event.table, event.scores()
        ranked = ranking(table, scores, table.alive)
        closing = torch.zeros(len(table), dtype=torch.bool)
        closing[ranked[len(ranked) - min(self.n or len(table.layers), len(ranked)) :]] = True
        losers = set(table.module[closing].tolist())
        mean = {
            m: float(scores[(table.module == m) & table.alive].mean())
            for m in range(len(table.layers))
            if m not in losers and bool(((table.module == m) & table.alive).any())
        }
        freed = int(closing.sum())
        table.drop(closing)
        # The remainder goes to the modules with the highest mean score; where every module lost one, none is added.
        winners = sorted(mean, key=lambda m: (-mean[m], m))
        for place, m in enumerate(winners):
            share = freed // len(winners) + (place < freed % len(winners))
            if share:
                table.grow(m, share, event.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])
