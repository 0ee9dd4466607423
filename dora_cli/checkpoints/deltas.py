"""Several updates of one weight as one: sums of them (linear), and sums of some of their elements (TIES, DARE).

For updates Δ₁ … Δ_n of one weight, weights w and a density d:

- ``linear``: Σ wₜ Δₜ (task arithmetic, Ilharco et al. 2023);
- ``ties`` (Yadav et al. 2023): of each Δₜ the share d of its elements that are largest in magnitude is kept; each
  element elects the sign γ of their sum Σ Δₜ; the result is the mean of wₜ Δₜ over those kept elements whose sign is γ;
- ``dare_linear`` (Yu et al. 2024): each element of Δₜ is kept with the chance d and divided by d; then Σ wₜ Δₜ;
- ``dare_ties``: elements kept as in DARE, then sign and mean as in TIES.

All is by weight matrix and by blocks of rows: no ΔW is ever whole in memory, but for those of squares (MoRA).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from dora_cli.adapters.mora import rotation_delta
from dora_cli.checkpoints.adapter_format import LowRank, Square

Rows = Callable[[slice], Tensor]  # a block of rows of an update, as the weight is stored
BINS = 1 << 16


@dataclass(frozen=True)
class Combination:
    """How several adapters become one.

    Attributes:
        how: one of ``WAYS``.
        weights: one for each adapter.
        density: the share of elements that is kept; ``linear`` keeps all.
        seed: of DARE's choice of elements.
    """

    how: str
    weights: tuple[float, ...]
    density: float = 1.0
    seed: int = 1


WAYS = ("linear", "ties", "dare_linear", "dare_ties")


@dataclass(frozen=True, eq=False)
class Deltas:
    """The updates of one weight, with the place of each one's adapter among those that are combined."""

    name: str
    updates: Sequence[tuple[int, LowRank | Square]]
    combination: Combination

    def rows(self, blocks: Sequence[slice]) -> Iterator[Tensor]:
        """The combined update, block by block.

        Args:
            blocks: of rows of the weight as it is stored, from the first row to the last.

        Yields:
            Float32, as many rows as the block has.
        """
        c = self.combination
        deltas = [delta_rows(update) for _, update in self.updates]
        limits = [0.0] * len(deltas)
        if c.how == "ties":
            limits = [smallest_kept(delta, blocks, c.density) for delta in deltas]
        draws = [_generator(c.seed, place, self.name) for place, _ in self.updates]
        weights = [c.weights[place] for place, _ in self.updates]
        for block in blocks:
            kept = []
            for delta, limit, draw in zip(deltas, limits, draws, strict=True):
                rows = delta(block)
                if c.how == "ties":
                    rows = torch.where(rows.abs() >= limit, rows, 0.0)
                elif c.how.startswith("dare"):
                    # rand draws number by number, so that blocks of any size get the same elements
                    rows = torch.where(torch.rand(rows.shape, generator=draw) < c.density, rows / c.density, 0.0)
                kept.append(rows)
            yield elected_mean(kept, weights) if c.how.endswith("ties") else weighted_sum(kept, weights)


def delta_rows(update: LowRank | Square) -> Rows:
    """ΔW of one update, any block of its rows at a time."""
    if isinstance(update, Square):
        delta = rotation_delta(update.m, *update.shape)
        delta = delta.T if update.transposed else delta
        return lambda block: delta[block]
    left, right = (update.a.T.contiguous(), update.b.T.contiguous()) if update.transposed else (update.b, update.a)
    return lambda block: left[block] @ right


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wₜ Δₜ."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def elected_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of each element, the mean of wₜ Δₜ over those Δₜ that are not 0 and have the sign of Σ Δₜ; 0 where none has."""
    positive = weighted_sum(deltas, [1.0] * len(deltas)) >= 0
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        total.add_(delta * agrees, alpha=weight)
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))


def smallest_kept(delta: Rows, blocks: Sequence[slice], density: float) -> float:
    """The magnitude of the smallest element among the share ``density`` of the largest, exactly, in two passes.

    Magnitudes are ordered as their bits are, so that the upper half of the bits is counted first, and then the lower
    half of those that share the right upper one. Elements of one magnitude at the limit are all kept.

    Returns:
        0 where everything is kept; infinity where nothing is.
    """
    upper, total = torch.zeros(BINS, dtype=torch.int64), 0
    for block in blocks:
        bits = _magnitude_bits(delta(block))
        upper += torch.bincount(bits >> 16, minlength=BINS)
        total += bits.numel()
    wanted = int(density * total)
    if wanted in (0, total):
        return float("inf") if total and not wanted else 0.0
    first, beyond = _bin_of(upper, wanted)
    lower = torch.zeros(BINS, dtype=torch.int64)
    for block in blocks:
        bits = _magnitude_bits(delta(block))
        lower += torch.bincount(bits[bits >> 16 == first] & (BINS - 1), minlength=BINS)
    last, _ = _bin_of(lower, wanted - beyond)
    return torch.tensor(first << 16 | last, dtype=torch.int32).view(torch.float32).item()


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the ``wanted``-th largest, and how many lie in the bins above it."""
    above = counts.flip(0).cumsum(0).flip(0)  # in this bin or a higher one
    found = int((above >= wanted).nonzero().max())
    return found, int(above[found] - counts[found])


def _magnitude_bits(delta: Tensor) -> Tensor:
    return delta.abs().reshape(-1).view(torch.int32).long()


def _generator(seed: int, place: int, name: str) -> torch.Generator:
    """The same draws for one weight of one adapter, in whatever order and with how many threads weights are merged."""
    digest = sha256(f"{seed}/{place}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
