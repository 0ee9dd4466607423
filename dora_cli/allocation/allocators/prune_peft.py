"""AdaLoRA's pruning as PEFT does it (``AdaLoraModel.update_and_allocate``), step by step (METHODS 3).

For reproduction; ``prune`` is exact. PEFT's names: t_init is the window's start, T − t_final its end, ΔT the interval.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.adapters.base import AdapterLayer
from dora_cli.allocation.allocators.base import Event
from dora_cli.allocation.allocators.masked import Masked
from dora_cli.allocation.schedules import CubicEarly, Window
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict


@dataclass
class PrunePeft(Masked):
    """Masks every component at or below the k-th smallest score, all that tie with it too, k = b₀ − int(b(t)).

    A masked component is never dropped: until the end it may return, and after it its gate is closed again after each
    step, while the orthogonality term still moves its row and column.
    """

    interval: int = field(default=1, metadata={"help": "act at steps that this divides", "low": 1})

    verbs: ClassVar[frozenset[str]] = frozenset({"silence"})
    name: ClassVar[str] = "prune_peft"

    def attach(self, table: UnitTable) -> None:
        self._masked: list[tuple[AdapterLayer, Tensor]] | None = None

    def is_event(self, step: int, window: Window) -> bool:
        """Multiples of the interval inside the window, counted from step 0; and always its end."""
        return step == window.end or (window.start < step < window.end and step % self.interval == 0)

    def observes(self, step: int, window: Window) -> bool:
        """At the end itself the choice rests on what was seen before."""
        return step < window.end

    def after_step(self, table: UnitTable, step: int, window: Window, verdict: Verdict = TAKEN) -> None:
        if step <= window.end:
            return
        if self._masked is None:  # what the final choice masked stays so: looked up once
            self._masked = list(table.positions(~table.alive & ~table.dropped))
        for layer, positions in self._masked:  # the optimizer has moved their gates away from zero
            layer.silence(positions)

    def act(self, event: Event) -> None:
        n_masked = event.first - self._budget(event)
        keep = torch.ones(len(event.table), dtype=torch.bool)
        if n_masked > 0:
            scores = event.scores()
            keep = scores > torch.kthvalue(scores, n_masked).values
        event.table.keep(keep, final=False)

    def _budget(self, event: Event) -> int:
        """int((b₀ − b_T) · g(x) + b_T), with g written as PEFT writes it: its rounding decides what int() cuts."""
        x, first, last = event.window.x(event.step), event.first, event.last
        if isinstance(event.schedule, CubicEarly):
            left: float = (1 - x) ** 3
        else:
            left = 1 - event.schedule.share(x, first, last)
        return int((first - last) * left + last)
