"""AdaLoRA's P Λ Q (Zhang et al., ICLR 2023, arXiv 2303.10512): ΔW = α/(r + 1e-5) P diag(λ) Q.

``b`` is P (d_out, r), ``c`` is λ (r,), ``a`` is Q (r, d_in); the ``orthogonal`` regularizer keeps P and Q near
orthonormal.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import LowRankLayer, linear_shape
from dora_cli.adapters.part import LowRankPart

INIT_STD = 0.02  # both published codes


class SvdLayer(LowRankLayer):
    def fresh(self, n: int) -> dict[str, Tensor]:
        """ElaLoRA's way (arXiv 2504.00254): unit rows and columns orthogonal to those that are there, λ = 0."""
        return {
            "a": orthogonal_rows(n, self.a.detach()),
            "b": orthogonal_rows(n, self.b.detach().T).T,
            "c": torch.zeros(n, device=self.c.device),
        }


@dataclass
class Svd(LowRankPart):
    """λ = 0, P and Q ~ N(0, 0.02²) (METHODS 3)."""

    decay_gates: bool = field(default=False, metadata={"help": "weight decay on λ too, as PEFT's loop has it"})

    provides: ClassVar[frozenset[str]] = frozenset({"rows", "gates", "directions"})

    def scale(self, start_rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / (max(start_rank, 1) + 1e-5)

    def layer(self, base: nn.Module, rank: int) -> SvdLayer:
        d_out, d_in = linear_shape(base)
        device = next(base.parameters()).device
        a = torch.randn(rank, d_in).to(device) * INIT_STD
        b = torch.randn(d_out, rank).to(device) * INIT_STD
        layer = SvdLayer(base, a, b, torch.zeros(rank, device=a.device), self.scale(rank), self.dropout)
        if self.decay_gates:
            layer.no_decay = frozenset()
        return layer


def orthogonal_rows(n: int, existing: Tensor) -> Tensor:
    """``n`` random rows (n, d) of unit length, orthogonal to each other and to ``existing`` (r, d) while d has room."""
    rows = torch.randn(n, existing.shape[1]).to(existing.device)
    for i in range(n):
        basis = torch.linalg.qr(torch.cat([existing.float(), rows[:i]]).T).Q if len(existing) + i else rows[:0].T
        for _ in range(2):  # the second pass takes out what rounding left of the first
            rows[i] -= basis @ (basis.T @ rows[i])
        if rows[i].norm() < 1e-4:  # no room left: any direction
            rows[i] = torch.randn(rows[i].shape).to(rows.device)
        rows[i] /= rows[i].norm()
    return rows
