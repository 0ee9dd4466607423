"""EVA (Paischer et al. 2024, arXiv 2410.07170): factors and ranks start from the principal directions of the inputs."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import linear_shape
from dora_cli.adapters.init.base import Init, Passes
from dora_cli.adapters.svd import orthogonal_rows
from dora_cli.modes import evaluating

SEED = 42  # of the random part of a sketch
ROUNDS = 12  # of subspace iteration: on MiniLM's inputs as good as exact (cosines to 1e-4), at a tenth of the time


class RunningPca:
    """The ``k`` leading principal directions of rows (n, d) that come in batches, without keeping the rows.

    Ross et al., IJCV 2008: the decomposition so far, the new rows and the step of the mean have together the scatter of
    all rows; their leading directions are the new decomposition.

    Attributes:
        directions: orthonormal, shape (c, d), c ≤ k: fewer while the rows seen span less.
        sizes: singular values of the centred rows seen, shape (c,), descending.
        steady: whether each direction stayed where it was in the last update, shape (c,).
    """

    def __init__(self, k: int, d: int, tolerance: float, device: torch.device) -> None:
        self.k, self.tolerance = k, tolerance
        self.count, self.scatter = 0, 0.0  # Σ ‖x − mean‖²
        self.mean = torch.zeros(d, device=device)
        self.directions = torch.zeros(0, d, device=device)
        self.sizes = torch.zeros(0, device=device)
        self.steady = torch.zeros(0, dtype=torch.bool, device=device)

    def update(self, x: Tensor) -> None:
        n, before = len(x), self.directions
        if n == 0:
            return
        x = x.float()
        mean = x.mean(dim=0)
        centred, total = x - mean, self.count + n
        step = (self.mean - mean) * (self.count * n / total) ** 0.5
        self.scatter += float(centred.square().sum() + step.square().sum())
        stacked = torch.cat([self.sizes[:, None] * before, centred, step[None]])
        self.sizes, self.directions = leading(stacked, self.k, before)
        self.mean += (mean - self.mean) * (n / total)
        self.count = total
        both = min(len(before), len(self.directions))
        self.steady = torch.zeros(len(self.directions), dtype=torch.bool, device=x.device)
        # Of signed directions, as in the published code: where the largest entry has become another, wait once more.
        cosines = (self.directions[:both] * before[:both]).sum(dim=1)
        self.steady[:both] = cosines >= self.tolerance

    def settled(self, rank: int) -> bool:
        """Whether the first ``rank`` directions have stopped moving."""
        return self.count > 0 and bool(self.steady[:rank].all())

    def ratios(self) -> Tensor:
        """(c,) the share of the rows' variance along each direction, float64, on the CPU."""
        return self.sizes.double().cpu() ** 2 / self.scatter


def leading(x: Tensor, k: int, near: Tensor) -> tuple[Tensor, Tensor]:
    """The ``k`` largest singular values of x (m, d) and their right vectors (k, d); fewer where x has a lower rank.

    Subspace iteration (Halko et al., SIAM Review 2011, Algorithm 4.4) from the rows of ``near`` (c ≤ k, d) and random
    ones, 2k in all, which is exact where 2k reaches the smaller side. The same on every call; each vector's largest
    entry is positive.
    """
    m, d = x.shape
    width = min(2 * k, m, d)
    noise = torch.randn(d, width, generator=torch.Generator().manual_seed(SEED))
    basis = torch.cat([near.T, noise.to(x)[:, len(near) :]], dim=1)
    for _ in range(ROUNDS):
        basis = x.T @ torch.linalg.qr(x @ torch.linalg.qr(basis).Q).Q
    basis = torch.linalg.qr(basis).Q
    _, sizes, right = torch.linalg.svd(x @ basis, full_matrices=False)
    vectors = right @ basis.T
    signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    real = sizes > sizes[:1] * max(m, d) * torch.finfo(x.dtype).eps  # the others are rounding
    real[k:] = False
    return sizes[real], (vectors * signs)[real]


def share_out(ratios: Sequence[Tensor], candidates: Sequence[int], costs: Sequence[int], limit: int) -> list[int]:
    """Ranks per module: all candidates in one order of explained variance, and the largest prefix that fits ``limit``.

    Args:
        ratios: of each module's directions, descending; where there are fewer than candidates, the rest counts as 0.
        candidates: the most that each module may get.
        costs: what one component of each module costs.
        limit: what all together may cost. Ties are broken by module order.
    """
    pairs = zip(ratios, candidates, strict=True)
    values = torch.cat([nn.functional.pad(r[:c], (0, max(c - len(r), 0))) for r, c in pairs])
    module = torch.arange(len(costs)).repeat_interleave(torch.tensor(candidates))
    module = module[values.argsort(descending=True, stable=True)]
    kept = module[torch.tensor(costs)[module].cumsum(0) <= limit]
    return kept.bincount(minlength=len(costs)).tolist()


@dataclass
class Eva(Init):
    """A's rows are the leading principal directions of the module's inputs, and ranks go where variance is explained.

    Args:
        rho: candidates per module are round(rho · rank); 1 moves no ranks.
        tolerance: a direction counts as found when the cosine to its place before the last batch is at least this.
        whiten: divide each direction by √(its singular value).
    """

    rho: float = 2.0
    tolerance: float = 0.99
    whiten: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    looks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.rows: dict[str, Tensor] = {}  # module → what A starts from, (c, d_in), c ≤ its rank
        self.notes: list[str] = []

    def observe(
        self, model: nn.Module, names: Sequence[str], ranks: Sequence[int], costs: Sequence[int], passes: Passes
    ) -> list[int]:
        """Look until every direction that the ranks take stands still, or the data end; keep them for ``fill``."""
        modules = [model.get_submodule(name) for name in names]
        candidates = [max(1, round(self.rho * rank)) for rank in ranks]  # a budget below one each leaves some at 0
        limit = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
        new, batches = candidates, 0
        with evaluating(model), torch.no_grad():
            stream = iter(passes)
            first = next(stream)
            groups = _sharing_inputs(modules, first[1])
            pcas = self._pcas(modules, candidates, groups)
            for tokens, forward in chain([first], stream):
                moving = [g[0] for g in groups if not pcas[g[0]].settled(max(new[i] for i in g))]
                if not moving:
                    break
                with _watching([(modules[i], partial(_take, pcas[i], tokens)) for i in moving]):
                    forward()
                new = share_out([pca.ratios() for pca in pcas], candidates, costs, limit)
                batches += 1
        for name, pca, rank in zip(names, pcas, new, strict=True):
            rows = pca.directions[:rank]
            self.rows[name] = rows / pca.sizes[: len(rows), None].sqrt() if self.whiten else rows
        self.notes = _notes(pcas, new, batches)
        return new

    def fill(self, name: str, layer: Any) -> None:
        """The directions as A's rows; where the data span fewer, the rest are random, orthogonal to them."""
        rows = self.rows[name]
        layer.start_from_rows(torch.cat([rows, orthogonal_rows(layer.rank - len(rows), rows)]))

    def _pcas(self, modules: list[nn.Module], candidates: list[int], groups: list[list[int]]) -> list[RunningPca]:
        """One for each module; modules with the same inputs have the same one, as wide as the widest asks for."""
        k = list(candidates)
        for group in groups:
            k[group[0]] = max(candidates[i] for i in group)
        pcas = [
            RunningPca(n, linear_shape(m)[1], self.tolerance, next(m.parameters()).device)
            for n, m in zip(k, modules, strict=True)
        ]
        for group in groups:
            for i in group:
                pcas[i] = pcas[group[0]]
        return pcas


def _sharing_inputs(modules: list[nn.Module], forward: Callable[[], object]) -> list[list[int]]:
    """Positions of the modules that a forward pass calls, those together that it calls with the very same tensors."""
    seen: list[weakref.ref[Tensor]] = []  # weak, so that activations are freed as ever; a dead one equals nothing
    calls: dict[int, tuple[int, ...]] = {}

    def note(i: int, x: Tensor) -> None:
        known = next((n for n, ref in enumerate(seen) if ref() is x), len(seen))
        if known == len(seen):
            seen.append(weakref.ref(x))
        calls[i] = (*calls.get(i, ()), known)

    with _watching([(module, partial(note, i)) for i, module in enumerate(modules)]):
        forward()
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(calls):
        groups.setdefault(calls[i], []).append(i)
    return list(groups.values())


def _take(pca: RunningPca, tokens: Tensor | Sequence[Tensor], x: Tensor) -> None:
    """Add a module's input x to its PCA: the positions where ``tokens`` (n, s), or the one of them that fits, is true.

    x may have one row for each position, or one for each of the n examples; any other is no input of the batch (a table
    of relative positions, say) and is left out.
    """
    tables = (tokens,) if isinstance(tokens, Tensor) else tokens
    for real in tables:
        if x.shape[:-1] in (real.shape, (real.numel(),)):
            pca.update(x.flatten(0, -2)[real.flatten()])
            return
    if len(x) == len(tables[0]):
        pca.update(x.flatten(0, -2))


@contextmanager
def _watching(calls: Sequence[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Call back with the input of each module, every time that it runs."""
    handles = [m.register_forward_pre_hook(lambda _, inputs, call=call: call(inputs[0])) for m, call in calls]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _notes(pcas: list[RunningPca], ranks: list[int], batches: int) -> list[str]:
    """What the user may want to know of a look at the data."""
    pairs = list(zip(pcas, ranks, strict=True))
    bare, moving = ranks.count(0), sum(rank > 0 and not pca.settled(rank) for pca, rank in pairs)
    notes = [f"adapter.init=eva read {batches} batches: ranks {min(ranks)} to {max(ranks)}"]
    if bare:
        notes[0] += f", {bare} of {len(ranks)} modules get no adapter"
    if moving:
        notes.append(f"adapter.init=eva: the data ended before the directions of {moving} modules stood still")
    short = sum(rank > len(pca.directions) for pca, rank in pairs)
    if short:
        notes.append(
            f"adapter.init=eva: the inputs of {short} modules span fewer directions than their rank; "
            "the other rows of A start at random"
        )
    return notes
