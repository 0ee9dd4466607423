"""Handing out new components: who gains how many, within what is left and what a module can hold."""

from collections.abc import Sequence

from torch import Tensor

from dora_cli.adapters.base import AdapterLayer, LowRankLayer
from dora_cli.allocation.table import UnitTable


def full_rank(layer: AdapterLayer) -> int:
    """Components beyond which a module gains nothing: the smaller side of the space that its factors live in."""
    return min(_sides(layer))


def component_cost(layer: AdapterLayer) -> int:
    """Parameters of one more component, also where the module has none."""
    return sum(_sides(layer))


def module_means(table: UnitTable, scores: Tensor) -> list[float]:
    """Mean score of each module's living units; −∞ where none lives, or one has no number."""
    scores = scores.nan_to_num(nan=-float("inf"))
    living = ((table.module == m) & table.alive for m in range(len(table.layers)))
    return [float(scores[mine].mean()) if mine.any() else -float("inf") for mine in living]


def hand_out(
    table: UnitTable, order: Sequence[int], left: int, *, by_cost: bool, at_once: int = 1, waits: bool = False
) -> dict[int, int]:
    """New components per module, in turns of ``at_once``, until nothing is left or every module has full rank.

    Args:
        table: who lives already.
        order: modules that may gain, the first in line first.
        left: components to hand out, or parameters where ``by_cost``.
        by_cost: whether a component takes what it costs.
        at_once: the most that a module gains in a turn.
        waits: stop at the first module that cannot have all of its turn, instead of going on to cheaper ones.
    """
    ranks = list(table.ranks().values())
    room = {m: full_rank(table.layers[m]) - ranks[m] for m in order}
    cost = {m: component_cost(table.layers[m]) if by_cost else 1 for m in order}
    shares: dict[int, int] = {}
    gained = True
    while gained:
        gained = False
        for m in order:
            wanted = min(at_once, room[m])
            n = min(wanted, left // cost[m])
            if n > 0:
                shares[m] = shares.get(m, 0) + n
                room[m], left, gained = room[m] - n, left - n * cost[m], True
            if waits and n < wanted:
                return shares
    return shares


def _sides(layer: AdapterLayer) -> tuple[int, int]:
    """The spaces that a component's two factors live in: the layer's own, or smaller ones (``mora_components``)."""
    if isinstance(layer, LowRankLayer):
        return layer.a.shape[1], layer.b.shape[0]
    return layer.d_in, layer.d_out
