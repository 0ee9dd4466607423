"""Exact selection: keep the best until the limit, ties broken by (module order, order within) (METHODS 0.4)."""

import torch
from torch import Tensor

from dora_cli.allocation.table import UnitTable


def ranking(table: UnitTable, scores: Tensor, candidates: Tensor) -> Tensor:
    """Table rows of ``candidates`` (n, bool), best score first; ties by (module, order); NaN counts as the worst."""
    rows = torch.nonzero(candidates).flatten()
    rows = rows[torch.argsort(table.order[rows], stable=True)]
    rows = rows[torch.argsort(table.module[rows], stable=True)]
    values = scores[rows].nan_to_num(nan=-torch.inf)
    return rows[torch.argsort(values, descending=True, stable=True)]


def top(table: UnitTable, scores: Tensor, limit: int, *, by_cost: bool, min_rank: int = 0) -> Tensor:
    """Mask (n,) of the units to keep: the largest prefix of the ranking that fits ``limit``.

    Args:
        table: all units; dropped ones are no candidates.
        scores: (n,) on the CPU; higher is better.
        limit: units, or parameters where ``by_cost``.
        min_rank: the best this-many of each module come before all others.
    """
    ranked = ranking(table, scores, ~table.dropped)
    if min_rank > 0:
        place = torch.empty(len(ranked), dtype=torch.long)  # place of each within its module, best 0
        for m in table.module[ranked].unique().tolist():
            of_module = torch.nonzero(table.module[ranked] == m).flatten()
            place[of_module] = torch.arange(len(of_module))
        ranked = ranked[torch.argsort((place >= min_rank).long(), stable=True)]
    weight = table.cost[ranked] if by_cost else torch.ones(len(ranked), dtype=torch.long)
    kept = ranked[torch.cumsum(weight, 0) <= limit]
    return torch.zeros(len(table), dtype=torch.bool).index_fill_(0, kept, True)


def prefix_closed(table: UnitTable, scores: Tensor) -> Tensor:
    """Scores (n,) by which whatever is kept of a nested module is a prefix: none counts more than any before it.

    The first, without which none of the others takes part, comes before everything else.
    """
    scores = scores.clone()
    for m, layer in enumerate(table.layers):
        if layer.nested:
            mine = torch.nonzero(table.module == m).flatten()  # in their order, which is that of the table
            scores[mine] = scores[mine].nan_to_num(nan=-torch.inf).cummin(0).values
            scores[mine[:1]] = torch.inf
    return scores
