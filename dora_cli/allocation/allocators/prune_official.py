"""DoRA's pruning as its official code does it, quirks included (METHODS 2.5, 2.7, 2.9). For reproduction only."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dora_cli.allocation.allocators.base import Event
from dora_cli.allocation.allocators.masked import Masked
from dora_cli.allocation.schedules import Window


@dataclass
class PruneOfficial(Masked):
    """Prunes ``max(int(N · share · x³), 1)`` components and whatever ties with the last; masks, never compacts."""

    interval: int = field(default=10, metadata={"help": "steps between events", "low": 1})

    verbs: ClassVar[frozenset[str]] = frozenset({"silence", "drop"})
    name: ClassVar[str] = "prune_official"

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
