"""DoRA's importance (Mao et al., Eq. 7–8): how much of a module's update a component is, smoothed per component."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dora_cli.allocation.importance.base import FlatScores
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict

EPSILON = 1e-8  # the official code's; the paper has none


def component_norms(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius norms of every component and of the whole update, without forming either (METHODS 2.3).

    ‖c_i b_i a_iᵀ‖_F = |c_i|·‖b_i‖·‖a_i‖ and ‖B diag(c) A‖_F² = cᵀ (BᵀB ∘ AAᵀ) c.

    Args:
        a: right factors, (m, r, d_in).
        b: left factors, (m, d_out, r).
        c: gates, (m, r).

    Returns:
        (m, r) and (m,).
    """
    gram_a = a @ a.mT  # (m, r, r); its diagonal holds the squared norms of the rows
    gram_b = b.mT @ b
    squares = (gram_a.diagonal(dim1=-2, dim2=-1) * gram_b.diagonal(dim1=-2, dim2=-1)).clamp_min(0)
    total = (c * ((gram_a * gram_b) @ c[:, :, None]).squeeze(2)).sum(1).clamp_min(0).sqrt()
    return c.abs() * squares.sqrt(), total


@dataclass
class ComponentNorm(FlatScores):
    """s_i = ‖ΔW_i‖_F / (‖ΔW‖_F + ε); s̃ ← β s̃ + (1 − β) s from step 1 on, starting at 0, no bias correction."""

    beta: float = field(default=0.9, metadata={"help": "smoothing of the scores", "low": 0.0, "below": 1.0})

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    def update(self, table: UnitTable, step: int, verdict: Verdict = TAKEN) -> None:
        smoothed = self._extended(table)
        for group in table.groups():
            norms, total = component_norms(*group.factors(), group.gates())
            share = norms / (total + EPSILON)[:, None]
            before = smoothed[group.index]
            blend = self.beta * before + (1 - self.beta) * share.to(smoothed.dtype)
            smoothed[group.index] = verdict.choose(blend, before)
