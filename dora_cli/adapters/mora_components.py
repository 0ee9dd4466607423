"""A square update that can be pruned (our design): MoRA's sharing (arXiv 2405.12130) over M = Σ cᵢ uᵢ vᵢᵀ.

ΔW = D M C = Σ cᵢ (D uᵢ)(Cᵀ vᵢ)ᵀ, C and D as in ``mora.py``. A component costs 2r̂ parameters and not d_in + d_out, so a
budget in parameters affords many more of them than LoRA has.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import LowRankLayer, linear_shape, uniform
from dora_cli.adapters.mora import compressed, sharing_factors, square_side, wrapped
from dora_cli.adapters.part import RankedPart
from dora_cli.errors import UserError


class MoraComponentsLayer(LowRankLayer):
    """``a`` is V (r, r̂), ``b`` is U (r̂, r), both inside the square; cᵢ = 0 closes component i."""

    @property
    def side(self) -> int:
        return self.a.shape[1]

    def update(self, x: Tensor) -> Tensor:
        return wrapped(super().update(compressed(x, self.side)), self.d_out)

    def factors(self) -> tuple[Tensor, Tensor]:
        return sharing_factors(self.a, self.b, self.d_out, self.d_in)

    def unit_costs(self) -> list[int]:
        return [2 * self.side] * self.rank

    def fresh(self, n: int) -> dict[str, Tensor]:
        a, b = _factors(n, self.rank, self.side, self.d_in, self.a)
        return {"a": a, "b": b, "c": torch.zeros(n, device=self.c.device)}

    def load_low_rank(self, a: Tensor, b: Tensor) -> None:
        raise UserError(
            "adapter=mora_components cannot start from a low-rank adapter",
            where="its factors lie inside the square, and most pairs have no counterpart there",
            hint="use adapter=components or adapter=lora",
        )


@dataclass
class MoraComponents(RankedPart):
    """c = 0, and U, V uniform so that D U and Cᵀ V are as large as DoRA's B and A (METHODS 2.2). The scale is 1."""

    square_rank: int = field(
        default=8,
        metadata={"help": "sets the square's side r̂: r̂² is at most (d_in + d_out) · square_rank", "low": 1},
    )

    units: ClassVar[tuple[str, ...]] = ("components", "modules")
    verbs: ClassVar[frozenset[str]] = frozenset({"silence", "drop", "grow"})
    provides: ClassVar[frozenset[str]] = frozenset({"gates"})

    def unit_cost(self, d_out: int, d_in: int) -> int:
        return 2 * square_side(d_out, d_in, self.square_rank)

    def scale(self, start_rank: int) -> float:
        return 1.0

    def layer(self, base: nn.Module, rank: int) -> MoraComponentsLayer:
        d_out, d_in = linear_shape(base)
        a, b = _factors(rank, rank, square_side(d_out, d_in, self.square_rank), d_in, base.weight)  # type: ignore[arg-type]
        return MoraComponentsLayer(base, a, b, torch.zeros(rank, device=a.device), self.scale(rank), self.dropout)


def _factors(n: int, rank: int, side: int, d_in: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """V (n, r̂) and U (r̂, n). Each entry is used about d / r̂ times, so the bounds are those of the unshared factors."""
    return uniform(n, side, (6 / d_in) ** 0.5, like), uniform(side, n, (6 / max(rank, 1)) ** 0.5, like)
