"""A trained low-rank adapter made smaller without data: the best approximation of each ΔW, all modules ranked as one.

ΔW = B A is not formed: with B = Q_B R_B and Aᵀ = Q_A R_A its singular values are those of the small core R_B R_Aᵀ
(METHODS 0.3, item 8). Cutting every ΔW to its largest singular values is the best cut there is (Eckart and Young), and
the squared error of all modules together is the sum of the σ² that are left out. So which to keep is one ranking over
the singular values of all modules, cut where a limit or a share of Σσ² is reached (METHODS 10, PARA; 11.2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dora_cli.allocation.budget import Budget, Target
from dora_cli.errors import UserError

ROUNDING = torch.finfo(torch.float32).eps  # of the factors, as they lie in the file


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """The singular values of B A that are more than rounding, in float64, largest first.

    A component that depends on others leaves a singular value of what float32 made of it. Each rounded component is
    off by at most ``ROUNDING`` times its norm, so what is no larger than the sum of these is taken for 0.

    Args:
        a: shape ``(r, d_in)``.
        b: shape ``(d_out, r)``.
    """
    a, b = a.double(), b.double()
    noise = ROUNDING * (a.norm(dim=1) * b.norm(dim=0)).sum()
    core = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
    values: Tensor = torch.linalg.svdvals(core)
    return values[values > noise]


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A of this rank, as balanced factors: ‖a_i‖ = ‖b_i‖ = √σ_i, largest first.

    Args:
        a: shape ``(r, d_in)``.
        b: shape ``(d_out, r)``.
        rank: components to keep.

    Returns:
        Shapes ``(rank, d_in)`` and ``(d_out, rank)``, float32, computed in float64.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = values[:rank].sqrt()
    return (root[:, None] * (right[:rank] @ q_a.T)).float(), ((q_b @ left[:, :rank]) * root).float()


@dataclass(frozen=True)
class Spectra:
    """The singular values of an adapter.

    Attributes:
        names: full module names.
        stored: components of each as the file has them, dependent ones and zeros included.
        costs: parameters of one component, d_in + d_out.
        values: per module, as ``singular_values`` gives them.
    """

    names: Sequence[str]
    stored: Sequence[int]
    costs: Sequence[int]
    values: Sequence[Tensor]

    @property
    def parameters(self) -> int:
        """Of all factors, as the file has them."""
        return _cost(self.stored, self.costs)

    @cached_property
    def energies(self) -> list[float]:
        """‖ΔW‖² of each module: its Σσ²."""
        return [float(values.square().sum()) for values in self.values]

    @property
    def ranks(self) -> list[int]:
        """How many components of each are no rounding: as many as an exact copy needs."""
        return [len(values) for values in self.values]


@dataclass(frozen=True)
class Choice:
    """What is kept of every module: its ``ranks`` largest singular values.

    Attributes:
        uniform: whether all modules are written with the largest of these ranks.
    """

    spectra: Spectra
    ranks: Sequence[int]
    uniform: bool = False

    @property
    def parameters(self) -> int:
        """Of all factors as they are written."""
        ranks = [max(self.ranks)] * len(self.ranks) if self.uniform else self.ranks
        return _cost(ranks, self.spectra.costs)

    @cached_property
    def lost(self) -> list[float]:
        """‖ΔW − ΔW'‖² of each module: the Σσ² of what is left out."""
        return [float(v[rank:].square().sum()) for v, rank in zip(self.spectra.values, self.ranks, strict=True)]

    @property
    def energy(self) -> float:
        """The share of Σσ² over all modules that is kept."""
        return 1 - sum(self.lost) / sum(self.spectra.energies)

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules, Frobenius."""
        return (sum(self.lost) / sum(self.spectra.energies)) ** 0.5

    @property
    def errors(self) -> list[float]:
        """The same of each module; 0 where it has no update."""
        return [(lost / e) ** 0.5 if e else 0.0 for lost, e in zip(self.lost, self.spectra.energies, strict=True)]


def limit(budget: Budget, spectra: Spectra, n_targets: int) -> Target:
    """What a budget comes to for a trained adapter.

    A share is one of the parameters of its factors, so that it says what the file shrinks to; an average rank counts
    components over ``n_targets`` modules, as in training.

    Raises:
        UserError: it keeps nothing, or more than there is.
    """
    by_cost = budget.kind != "average"
    if budget.kind == "average":
        target = Target(round(budget.value * n_targets), by_cost)
    else:
        target = share_of(spectra, budget.value) if budget.kind == "share" else Target(round(budget.value), by_cost)
    word, there = ("parameters", spectra.parameters) if by_cost else ("components", sum(spectra.stored))
    if target.limit > there:
        raise UserError(
            f"budget={budget.text} asks for more than the adapter has: {target.limit:,} of {there:,} {word}",
            hint="set a smaller one; energy=1 takes away what changes nothing",
        )
    if target.limit < (min(spectra.costs) if by_cost else 1):
        raise UserError(
            f"budget={budget.text} keeps no component at all",
            where=f"the adapter has {spectra.parameters:,} parameters, its smallest component {min(spectra.costs):,}",
            hint="raise the budget",
        )
    return target


def share_of(spectra: Spectra, share: float) -> Target:
    """The number of parameters that a share of the adapter's is, rounded down."""
    return Target(math.floor(round(share * spectra.parameters, 6)), by_cost=True)  # 0.7 × 30 is a little below 21


def within(spectra: Spectra, target: Target, rank_by: str) -> Choice:
    """The best of the ranking, each that still fits: so no more than the limit, and nothing that fits is left out.

    What is kept of a module is its largest values nevertheless: all of its components have one cost.

    Args:
        target: components, or parameters.
        rank_by: ``energy`` ranks by σ², which loses least at a number of components; ``energy_per_parameter`` by σ²
            over the cost of a component, the greedy answer for a number of parameters. By that a larger limit never
            loses more: all that is taken after one that does not fit is worth less than that one.
    """
    order, module, _, costs = _ranked(spectra, rank_by)
    ranks, left = [0] * len(spectra.names), target.limit
    for m, cost in zip(module[order].tolist(), costs[order].tolist(), strict=True):
        cost = cost if target.by_cost else 1
        if cost <= left:
            ranks[m], left = ranks[m] + 1, left - cost
    return Choice(spectra, ranks)


def reaching(spectra: Spectra, share: float, rank_by: str) -> Choice:
    """The smallest prefix of the ranking whose share of Σσ² is at least ``share``, in (0, 1]."""
    order, module, energies, _ = _ranked(spectra, rank_by)
    sums = energies[order].cumsum(0)
    count = len(order) if share == 1 else int((sums < share * sums[-1]).sum()) + 1
    return Choice(spectra, torch.bincount(module[order[:count]], minlength=len(spectra.names)).tolist())


def one_rank_within(spectra: Spectra, target: Target) -> Choice:
    """The same rank in every module: the largest that fits, so that a file of one rank holds no filling.

    Raises:
        UserError: not even rank 1 fits.
    """
    each = sum(spectra.costs) if target.by_cost else len(spectra.names)
    rank = target.limit // each
    if not rank:
        word = "parameters" if target.by_cost else "components"
        raise UserError(
            f"the budget keeps {target.limit:,} {word}, and export=uniform needs {each:,}, a component in every module",
            hint="raise the budget, or leave export=uniform out",
        )
    return _one_rank(spectra, rank)


def one_rank_reaching(spectra: Spectra, share: float) -> Choice:
    """The same rank in every module: the smallest whose share of Σσ² is at least ``share``, in (0, 1]."""
    most = max(spectra.ranks)
    ranks = (rank for rank in range(1, most) if share < 1 and _one_rank(spectra, rank).energy >= share)
    return _one_rank(spectra, next(ranks, most))


def _one_rank(spectra: Spectra, rank: int) -> Choice:
    return Choice(spectra, [min(rank, most) for most in spectra.ranks], uniform=True)


def _ranked(spectra: Spectra, rank_by: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The order of all singular values, best first, and of each one its module, σ² and cost.

    Ties keep the order of the modules, and within a module of the values: so what is kept of each is its largest.
    """
    counts = torch.tensor(spectra.ranks)
    module = torch.arange(len(counts)).repeat_interleave(counts)
    energies = torch.cat([values.square() for values in spectra.values])
    costs = torch.tensor(spectra.costs)[module]
    worth = energies / costs if rank_by == "energy_per_parameter" else energies
    return torch.argsort(worth, descending=True, stable=True), module, energies, costs


def _cost(ranks: Sequence[int], costs: Sequence[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
