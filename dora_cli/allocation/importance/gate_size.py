"""The size of a component's gate, as it stands (SoRA, Ding et al., EMNLP 2023, arXiv 2311.11696)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.table import UnitTable


@dataclass
class GateSize(Importance):
    """|c|, with no smoothing: whatever closes gates has done its work on them already."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "gates"})
    remembers: ClassVar[bool] = False

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        scores = torch.zeros(len(table))
        for group in table.groups():
            scores[group.index.cpu()] = group.gates().abs().float().cpu()
        return scores
