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

    remembers: ClassVar[bool] = False
    units: ClassVar[frozenset[str]] = frozenset({"components", "tensors", "modules"})

    def attach(self, table: UnitTable) -> None:
        super().attach(table)
        self._seed = torch.initial_seed() % 2**32
        self.smoothed = self._draw(0, len(table))

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        born = len(table) - len(self.smoothed)
        if born:
            self.smoothed = torch.cat([self.smoothed, self._draw(len(self.smoothed), born)])
        return self.smoothed

    def _draw(self, first: int, n: int) -> Tensor:
        """A function of the seed and the first unit's number, so that a resumed run draws the same."""
        return torch.rand(n, generator=torch.Generator().manual_seed(self._seed + first))
