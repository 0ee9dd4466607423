"""B-LoRA's importance (Meo et al., arXiv 2406.13046): how likely it is that a component takes part."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.adapters.quantise import first_open, open_probability
from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.table import UnitTable


@dataclass
class GateProbability(Importance):
    """Π_{j ≤ i} P(z_j > 0) over the nested rank gates of a module, the first of which is always open (METHODS 6)."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "gate_probability"})

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        scores = torch.zeros(len(table), dtype=torch.float64)  # in float32, φ = 16 and φ = 20 would tie at 1
        for group in table.groups():
            open_gates = first_open(open_probability(group.stack("phi").cpu().double()))
            scores[group.index.cpu()] = open_gates.cumprod(-1)
        return scores
