"""AFLoRA's allocator (Liu et al., ACL 2024, arXiv 2403.13269): tensors stop training for good, one by one."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.table import UnitTable


@dataclass
class Freeze(Allocator):
    """The schedule counts tensors that still train, from all to none.

    ``exact`` (our design, METHODS 8) freezes the lowest scores until exactly as many train as the schedule says.
    ``quantile`` is the authors' code: with the schedule's frozen share ρ, a tensor freezes where its mean score lies
    below the ρ-quantile of the scores of single elements, pooled over all that still trains. Means lie above medians,
    so it lags behind the schedule; at the end all freeze either way.
    """

    interval: int | float = field(
        default=10, metadata={"help": "steps between events, or a share of the run", "above": 0}
    )
    rule: str = field(
        default="exact",
        metadata={"help": "freeze the scheduled count, or below a quantile", "choices": ("exact", "quantile")},
    )

    verbs: ClassVar[frozenset[str]] = frozenset({"freeze"})
    units: ClassVar[frozenset[str]] = frozenset({"tensors"})
    mode: ClassVar[str] = "static"

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        return int((~table.frozen).sum()), 0

    def act(self, event: Event) -> None:
        training = torch.nonzero(~event.table.frozen).flatten()
        if not len(training):
            return
        if event.final:
            freezing = training
        elif self.rule == "exact":
            order = torch.argsort(event.scores()[training], stable=True)
            freezing = training[order[: max(0, len(training) - event.limit)]]
        else:
            freezing = training[self._below_quantile(event, training)]
        mask = torch.zeros(len(event.table), dtype=torch.bool)
        mask[freezing] = True
        event.table.freeze(mask, event.optimizer)

    def _below_quantile(self, event: Event, training: Tensor) -> Tensor:
        """Which of the ``training`` rows freeze, by the ρ-quantile: the ⌊ρ n⌋-th smallest of n element scores."""
        share = event.schedule.share(event.window.x(event.step), event.first, event.last)
        elements = event.elements()
        mine = [elements[row] for row in training.tolist()]
        pool = torch.cat(mine)
        place = int(share * len(pool))
        if place < 1:
            return torch.zeros(len(mine), dtype=torch.bool)
        return (torch.stack([scores.mean() for scores in mine]) < pool.kthvalue(place).values).cpu()
