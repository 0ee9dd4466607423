"""Pruning of principal components: before each choice a module's components are turned into those of its SVD."""

from dataclasses import dataclass, field
from typing import ClassVar

from dora_cli.allocation.allocators.base import Event
from dora_cli.allocation.allocators.prune import Prune


@dataclass
class PrunePrincipal(Prune):
    """What A and B happen to be made of is no natural unit: components overlap, and a pruned one takes with it what
    others had relied on. Of the principal components of the same update, those that go cost the least that any cut to
    this rank can cost. Turning changes no output; components have no identity over time, so none returns.
    """

    interval: int | float = field(
        default=0.1, metadata={"help": "steps between events, or a share of the run", "above": 0}
    )
    cost_aware: bool = field(
        default=True, metadata={"help": "where the budget counts parameters, rank by score per parameter"}
    )

    revive: ClassVar[bool] = False  # type: ignore[misc]
    verbs: ClassVar[frozenset[str]] = frozenset({"turn", "drop"})
    turns: ClassVar[bool] = True

    def prepare(self, event: Event) -> None:
        event.table.turn(event.optimizer, event.agree)
