"""DoRA's components (Mao et al., ACL 2024, arXiv 2405.17357, Eq. 6): ΔW = (α/r') Σ cᵢ bᵢ aᵢᵀ."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import LowRankLayer, linear_shape, uniform
from dora_cli.adapters.part import LowRankPart


class ComponentsLayer(LowRankLayer):
    """Component i is (aᵢ, bᵢ, cᵢ); cᵢ = 0 closes it."""

    def fresh(self, n: int) -> dict[str, Tensor]:
        return {
            "a": uniform(n, self.d_in, (6 / self.d_in) ** 0.5, self.a),
            "b": uniform(self.d_out, n, (6 / max(self.rank, 1)) ** 0.5, self.b),
            "c": torch.zeros(n, device=self.c.device),
        }


@dataclass
class Components(LowRankPart):
    """c = 0; A, B Kaiming-uniform with gain √2, so B is large and c alone carries the size of ΔW (METHODS 2.2)."""

    decay_gates: bool = field(default=False, metadata={"help": "weight decay on c too, as the official code has it"})

    provides: ClassVar[frozenset[str]] = frozenset({"rows", "gates", "directions"})

    def layer(self, base: nn.Module, rank: int) -> ComponentsLayer:
        d_out, d_in = linear_shape(base)
        a = uniform(rank, d_in, (6 / d_in) ** 0.5, base.weight)  # type: ignore[arg-type]
        b = uniform(d_out, rank, (6 / max(rank, 1)) ** 0.5, a)
        layer = ComponentsLayer(base, a, b, torch.zeros(rank, device=a.device), self.scale(rank), self.dropout)
        if self.decay_gates:
            layer.no_decay = frozenset()
        return layer
