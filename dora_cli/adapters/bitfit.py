"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199): only the biases train. No budget applies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from dora_cli.adapters.whole import Frozen
from dora_cli.errors import UserError


@dataclass
class Bitfit(Frozen):
    """Every bias of the base trains, those of the layer norms included; saved and merged as whole parameters."""

    no_packed_base: ClassVar[str] = "it trains biases, which packed layers round to the type that they multiply in"

    def unfreeze(self, model: nn.Module, heads: Sequence[str] = ()) -> None:
        within = tuple(f"{head}." for head in heads)
        named = [(name, p) for name, p in model.named_parameters() if not name.startswith(within)]
        biases = [p for name, p in named if name.rpartition(".")[2] == "bias"]
        if not biases:
            raise UserError(
                f"adapter=bitfit trains biases, but {type(model).__name__} has none outside its head",
                hint="choose another method, such as method=lora",
            )
        for bias in biases:
            bias.requires_grad_(True)
