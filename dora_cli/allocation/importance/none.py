"""No importance: for methods that choose nothing."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError


@dataclass
class NoImportance(Importance):
    units: ClassVar[frozenset[str]] = frozenset({"components", "tensors", "modules", "none"})

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        raise UserError("importance=none scores nothing", hint="choose an importance, or allocator=none")
