"""AFLoRA's allocator (Liu et al., ACL 2024, arXiv 2403.13269): tensors stop training for good, one by one."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.table import UnitTable


@dataclass
class Freeze(Allocator):
    """The schedule counts tensors that still train, from all to none; exactly as many freeze as it says (METHODS 8)."""

    interval: int | float = field(
        default=10, metadata={"help": "steps between events, or a share of the run", "above": 0}
    )

    verbs: ClassVar[frozenset[str]] = frozenset({"freeze"})
    units: ClassVar[frozenset[str]] = frozenset({"tensors"})
    mode: ClassVar[str] = "static"

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        return int((~table.frozen).sum()), 0

    def act(self, event: Event) -> None:
        table = event.table
        training = torch.nonzero(~table.frozen).flatten()
        n_freezing = len(training) - event.limit
        if n_freezing > 0:
            order = torch.argsort(event.scores()[training], stable=True)
            mask = torch.zeros(len(table), dtype=torch.bool)
            mask[training[order[:n_freezing]]] = True
            table.freeze(mask, event.optimizer)
