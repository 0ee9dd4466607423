"""AdaLoRA's P Λ Q (Zhang et al., ICLR 2023, arXiv 2303.10512): ΔW = α/(r + 1e-5) P diag(λ) Q.

``b`` is P (d_out, r), ``c`` is λ (r,), ``a`` is Q (r, d_in); the ``orthogonal`` regularizer keeps P and Q near
orthonormal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import LowRankLayer, LowRankPart, linear_shape

INIT_STD = 0.02  # both published codes


class SvdLayer(LowRankLayer):
    def fresh(self, n: int) -> dict[str, Tensor]:
        return {
            "a": torch.randn(n, self.d_in, device=self.a.device) * INIT_STD,
            "b": torch.randn(self.d_out, n, device=self.b.device) * INIT_STD,
            "c": torch.zeros(n, device=self.c.device),
        }


@dataclass
class Svd(LowRankPart):
    """λ = 0, P and Q ~ N(0, 0.02²) (METHODS 3)."""

    def scale(self, start_rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / (start_rank + 1e-5)

    def layer(self, base: nn.Module, rank: int) -> SvdLayer:
        d_out, d_in = linear_shape(base)
        device = next(base.parameters()).device
        a = torch.randn(rank, d_in, device=device) * INIT_STD
        b = torch.randn(d_out, rank, device=device) * INIT_STD
        return SvdLayer(base, a, b, torch.zeros(rank, device=a.device), self.scale(rank), self.dropout)
