"""No regularizer."""

from dataclasses import dataclass
from typing import ClassVar

from dora_cli.allocation.regularizers.base import Regularizer
from dora_cli.allocation.table import UnitTable


@dataclass
class NoRegularizer(Regularizer):
    units: ClassVar[frozenset[str]] = frozenset({"components", "tensors", "modules", "none"})
    acts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.weight = 0.0

    def value(self, table: UnitTable) -> float:
        return 0.0
