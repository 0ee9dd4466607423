"""Open gates over a closed product (SoRA's start, Ding et al., EMNLP 2023, arXiv 2311.11696): c ~ N(0, 1), B = 0."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dora_cli.adapters.init.base import Init


@dataclass
class OpenGates(Init):
    """A ~ U(±1/√d_in) and B = 0 as in LoRA, so the start is the identity, but gates that are open and differ."""

    needs: ClassVar[frozenset[str]] = frozenset({"gates"})

    def fill(self, name: str, layer: Any) -> None:
        bound = layer.d_in**-0.5
        with torch.no_grad():
            layer.c.copy_(torch.randn(layer.c.shape))
            layer.b.zero_()
        rows = torch.empty(layer.a.shape).uniform_(-bound, bound)
        layer.start_from_rows(rows.to(layer.a.device))  # last: it may calibrate to all three
