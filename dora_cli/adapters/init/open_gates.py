"""Open gates over a closed product (SoRA's start, Ding et al., EMNLP 2023, arXiv 2311.11696): c ~ N(0, 1), B = 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_cli.adapters.init.lora import LoraStart


@dataclass
class OpenGates(LoraStart):
    """A ~ U(±1/√d_in) and B = 0 as in LoRA, so the start is the identity, but gates that are open and differ."""

    def gates(self, rank: int) -> Tensor:
        return torch.randn(rank)
