"""The two ends of the scale: every weight trains (``full``), or none but the head (``none``). No budget applies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from dora_cli.adapters.part import AdapterPart


@dataclass
class Frozen(AdapterPart):
    """A trained head on the frozen base: the control that tells what an adapter adds."""

    budgeted: ClassVar[bool] = False
    wraps: ClassVar[bool] = False
    export: ClassVar[str] = "full"


@dataclass
class Full(Frozen):
    """Full fine-tuning: no layers are wrapped, every parameter trains and is saved as it is."""

    no_packed_base: ClassVar[str] = "it trains the weights themselves, and packed ones have no gradient"

    def unfreeze(self, model: nn.Module, heads: Sequence[str] = ()) -> None:
        model.requires_grad_(True)
