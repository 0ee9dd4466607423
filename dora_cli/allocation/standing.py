"""How the units stood when an event ranked them: for people who ask what was pruned, and what nearly was."""

from typing import Any

import torch
from torch import Tensor

from dora_cli.allocation.table import UnitTable

N_QUANTILES = 21  # the lowest score, every twentieth of the ranking, the highest
NEAREST = 8  # units named on each side of the line


def standing(table: UnitTable, ranked: Tensor, before: Tensor, scores: Tensor) -> dict[str, Any]:
    """What an event's scores say, for its record.

    Args:
        table: after the event.
        ranked: (n,) bool, the units that it ranked: those not dropped before it.
        before: (n,) bool, the units that lived before it.
        scores: (n,) on the CPU, higher is better; units born at the event have none yet.

    Returns:
        ``quantiles`` of the finite scores, lowest first; ``lowest_kept`` and ``highest_lost``, None where there is
        none; ``lost``, units that lived and live no more, best first, and ``nearly_lost``, the worst that live on,
        worst first: each [module, number within it, score].
    """
    n = min(len(scores), len(ranked))
    scores, ranked, before = scores[:n].double(), ranked[:n], before[:n]
    finite = scores.isfinite()
    alive = table.alive[:n]
    kept, out = alive & ranked & finite, ~alive & ranked & finite
    values = scores[ranked & finite]
    places = torch.linspace(0, 1, N_QUANTILES, dtype=torch.float64)
    return {
        "quantiles": _brief(torch.quantile(values, places)) if len(values) else [],
        "lowest_kept": _brief(scores[kept].min().reshape(1))[0] if kept.any() else None,
        "highest_lost": _brief(scores[out].max().reshape(1))[0] if out.any() else None,
        "lost": _named(table, scores, before & ~alive & ranked & finite, best=True),
        "nearly_lost": _named(table, scores, kept, best=False),
    }


def _named(table: UnitTable, scores: Tensor, mask: Tensor, *, best: bool) -> list[list[Any]]:
    rows = torch.nonzero(mask).flatten()
    rows = rows[torch.argsort(scores[rows], descending=best, stable=True)][:NEAREST]
    values = _brief(scores[rows])
    return [
        [table.names[int(table.module[row])], int(table.order[row]), value]
        for row, value in zip(rows.tolist(), values, strict=True)
    ]


def _brief(values: Tensor) -> list[float]:
    """Six significant digits: these are read, never computed with."""
    return [float(f"{value:.6g}") for value in values.tolist()]
