"""Plain LoRA (Hu et al. 2021, arXiv 2106.09685): ΔW = (α/r) B A."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import LowRankLayer, linear_shape, uniform
from dora_cli.adapters.part import LowRankPart
from dora_cli.errors import UserError


class LoraLayer(LowRankLayer):
    """LoRA has no gates: a component is closed by a zero column of B, and A keeps its row for a return."""

    unit_axes: ClassVar[Mapping[str, int]] = {"a": 0, "b": 1}
    valve = "b"
    no_decay = frozenset()

    def fresh(self, n: int) -> dict[str, Tensor]:
        return {
            "a": uniform(n, self.d_in, self.d_in**-0.5, self.a),
            "b": torch.zeros(self.d_out, n, device=self.b.device),
        }


@dataclass
class Lora(LowRankPart):
    """A ~ U(±1/√d_in) (Kaiming with a = √5, as the reference library), B = 0 (METHODS 1)."""

    scaling: str = field(
        default="standard",
        metadata={"help": "alpha / rank, or alpha / √rank", "choices": ("standard", "rank_stabilised")},
    )

    verbs: ClassVar[frozenset[str]] = frozenset({"silence", "drop", "grow", "turn"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling == "rank_stabilised" and self.alpha is None:
            raise UserError(
                "adapter.scaling=rank_stabilised divides adapter.alpha by √rank, but adapter.alpha=null is scale 1",
                hint="set adapter.alpha, for example to 8",
            )

    def scale(self, start_rank: int) -> float:
        """rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) divides by √r: the scale does not fade with the rank."""
        if self.alpha is not None and self.scaling == "rank_stabilised":
            return self.alpha / max(start_rank, 1) ** 0.5
        return super().scale(start_rank)

    def layer(self, base: nn.Module, rank: int) -> LoraLayer:
        d_out, d_in = linear_shape(base)
        a = uniform(rank, d_in, d_in**-0.5, base.weight)  # type: ignore[arg-type]
        b = torch.zeros(d_out, rank, device=a.device)
        return LoraLayer(base, a, b, None, self.scale(rank), self.dropout)
