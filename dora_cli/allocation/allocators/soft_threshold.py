"""SoRA's allocator (Ding et al., EMNLP 2023, arXiv 2311.11696): gates shrink towards zero by a proximal step."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import softshrink

from dora_cli.allocation.allocators.prune import Prune
from dora_cli.allocation.budget import Budget
from dora_cli.allocation.schedules import Schedule, Window
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict
from dora_cli.errors import UserError


@dataclass
class SoftThreshold(Prune):
    """After every step up to the final choice g ← sign(g) · max(|g| − ξ, 0), exactly the proximal map of ξ‖g‖₁.

    A gate at zero returns only when a step moves it by more than ξ. The final choice keeps what the budget says.
    """

    threshold: float = field(default=3e-4, metadata={"help": "ξ, by which every gate shrinks at each step", "low": 0.0})

    needs: ClassVar[frozenset[str]] = frozenset({"gates"})
    tries: ClassVar[bool] = False  # gates close by themselves, on trial or not

    def check(self, learning_rate: float, schedule: Schedule, budget: Budget | None) -> None:
        if self.threshold >= learning_rate:
            raise UserError(
                f"allocator.threshold={self.threshold:g} would close every gate",
                where=f"at each step it takes more than AdamW can add at train.learning_rate={learning_rate:g}",
                hint="lower allocator.threshold or raise train.learning_rate (published: 3e-4 and 8e-4)",
            )

    def after_step(self, table: UnitTable, step: int, window: Window, verdict: Verdict = TAKEN) -> None:
        if step > window.end:
            return
        for group in table.groups():
            gates = group.stack("c")
            closer = verdict.choose(softshrink(gates, self.threshold), gates)
            torch._foreach_copy_([layer.c.detach() for layer in group.layers], list(closer.unbind(0)))
