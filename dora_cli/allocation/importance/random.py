"""The control: every unit has a random worth, drawn once. What a method gains over this is what its scores know."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.importance.base import FlatScores, Probe
from dora_cli.allocation.table import UnitTable


@dataclass
class Random(FlatScores):
    """Scores in (0, 1) from the run's seed; units born later draw theirs at their first event."""

    units: ClassVar[frozenset[str]] = frozenset({"components", "tensors"})

    def attach(self, table: UnitTable) -> None:
        super().attach(table)
        self._generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        self.smoothed = torch.rand(len(table), generator=self._generator)

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        born = len(table) - len(self.smoothed)
        if born:
            self.smoothed = torch.cat([self.smoothed, torch.rand(born, generator=self._generator)])
        return self.smoothed
