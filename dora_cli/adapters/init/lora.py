"""LoRA's start for components with gates: A ~ U(±1/√d_in), B = 0, c = 1 (Hu et al. 2021, arXiv 2106.09685)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_cli.adapters.init.base import Init


@dataclass
class LoraStart(Init):
    """The identity with gates that are open: B trains from the first step.

    With c = 0, as in DoRA, neither A nor B has a gradient until c has moved.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gates"})

    def gates(self, rank: int) -> Tensor:
        """Where c starts, (rank,)."""
        return torch.ones(rank)

    def fill(self, name: str, layer: Any) -> None:
        bound = layer.d_in**-0.5
        with torch.no_grad():
            layer.c.copy_(self.gates(layer.rank))
            layer.b.zero_()
        rows = torch.empty(layer.a.shape).uniform_(-bound, bound)
        layer.start_from_rows(rows.to(layer.a.device))  # last: it may calibrate to all three
