"""What the loss would lose with a component, to second order: the empirical Fisher information of a gate before it."""

from dataclasses import dataclass, field
from typing import ClassVar

from dora_cli.allocation.importance.base import FlatScores
from dora_cli.allocation.importance.gradient import gate_gradients
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict


@dataclass
class Fisher(FlatScores):
    """(∂L/∂g)² for a factor g = 1 before each component, smoothed from 0.

    Near a minimum the loss without it is higher by ½ ∂²L/∂g², and the mean of squared gradients stands for the second
    derivative (Theis et al. 2018, arXiv 1801.05787; Molchanov et al., CVPR 2019, Eq. 8). Unlike ``component_norm`` it
    sees what a component does to the loss, so modules of any size and kind are on one footing; unlike ``gradient`` it
    does not cancel out over batches.
    """

    beta: float = field(default=0.95, metadata={"help": "smoothing of the scores", "low": 0.0, "below": 1.0})

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def update(self, table: UnitTable, step: int, verdict: Verdict = TAKEN) -> None:
        smoothed = self._extended(table)
        for group in table.groups():
            before = smoothed[group.index]
            squares = gate_gradients(group).to(smoothed.dtype).square()
            smoothed[group.index] = verdict.choose(self.beta * before + (1 - self.beta) * squares, before)
