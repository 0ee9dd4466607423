"""ALoRA's importance (Liu et al., NAACL 2024, arXiv 2403.16187): the loss without a rank, and with it alone."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.table import UnitTable


@dataclass
class Ablation(Importance):
    """IS(r) = S(M) − S(M∖r) + S(M with only r) with S = −loss on one fixed validation batch (METHODS 5).

    Two forwards per living rank and event, or one where ``only_term`` is off.
    """

    rows: int = field(default=32, metadata={"help": "rows of the fixed validation batch", "low": 1})
    only_term: bool = field(default=True, metadata={"help": "include S(M with only r), a second forward per rank"})

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    remembers: ClassVar[bool] = False

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        assert probe is not None, "the composition check refuses this importance in a loop without a probe"
        scores = torch.full((len(table),), -torch.inf)
        ranked = ~table.dropped & ~table.spare  # silenced units too: they train between events and may return
        whole = -probe(ranked)
        for unit in torch.nonzero(ranked).flatten().tolist():
            without = ranked.clone()
            without[unit] = False
            scores[unit] = whole + probe(without)
            if self.only_term:
                only = torch.zeros(len(table), dtype=torch.bool)
                only[unit] = True
                scores[unit] -= probe(only)
        return scores
