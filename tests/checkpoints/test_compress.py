"""What compressing keeps and loses: against full singular value decompositions in float64, and every other choice."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dora_cli.allocation.budget import Target, parse_budget
from dora_cli.checkpoints.compress import (
    Choice,
    Spectra,
    limit,
    one_rank_reaching,
    one_rank_within,
    reaching,
    singular_values,
    truncated,
    within,
)
from dora_cli.errors import UserError

SHAPES = [(12, 7, 3), (7, 12, 1), (5, 4, 9), (30, 30, 8), (6, 5, 0)]  # d_out, d_in, r; once more than the matrix has


def pair(d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors whose components differ in size and, by far, in balance."""
    draw = torch.Generator().manual_seed(seed)
    sizes, balance = torch.logspace(-1, 1, rank), torch.logspace(3, -3, rank)
    a, b = torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw)
    return a * (sizes * balance)[:, None], b / balance


def spectra_of(pairs: list[tuple[Tensor, Tensor]]) -> Spectra:
    values = [singular_values(a, b) for a, b in pairs]
    costs = [a.shape[1] + b.shape[0] for a, b in pairs]
    return Spectra([f"m{i}" for i in range(len(pairs))], [len(a) for a, _ in pairs], costs, values)


@pytest.fixture
def pairs() -> list[tuple[Tensor, Tensor]]:
    """Five modules of unlike shapes and sizes."""
    shapes = [(6, 6, 3), (6, 12, 2), (12, 6, 4), (9, 3, 2), (4, 20, 3)]
    return [(a * (i + 1), b) for i, (a, b) in enumerate(pair(*shape, seed=i) for i, shape in enumerate(shapes))]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_cut_are_those_of_the_full_decomposition(shape: tuple[int, int, int]) -> None:
    a, b = pair(*shape)
    left, values, right = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    ours = singular_values(a, b)
    assert len(ours) == min(shape)
    torch.testing.assert_close(ours, values[: len(ours)], rtol=1e-9, atol=1e-12)
    for rank in range(len(ours) + 1):
        small_a, small_b = truncated(a, b, rank)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert small_a.dtype == small_b.dtype == torch.float32 and small_a.shape == (rank, a.shape[1])
        scale = float(values[0]) if len(values) else 1.0
        torch.testing.assert_close(small_b.double() @ small_a.double(), best, rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(small_a.norm(dim=1), small_b.norm(dim=0))  # balanced
        torch.testing.assert_close(small_a.norm(dim=1).double() ** 2, values[:rank], rtol=1e-5, atol=0)


def test_components_that_depend_on_others_vanish_without_error() -> None:
    a, b = pair(20, 16, 4)
    mixed_a = torch.cat([a, a[:1] * 0.3, torch.zeros(1, 16), a[1:2] / 3, a[2:3]])
    mixed_b = torch.cat([b, b[:, :1] * 7, torch.randn(20, 1), torch.randn(20, 1), torch.zeros(20, 1)], dim=1)
    values = singular_values(mixed_a, mixed_b)
    assert len(values) == 4  # a new column on an old row is that of a component that is there
    whole = mixed_b.double() @ mixed_a.double()
    small_a, small_b = truncated(mixed_a, mixed_b, len(values))
    assert (small_b.double() @ small_a.double() - whole).norm() < 1e-6 * whole.norm()
    assert singular_values(torch.zeros(3, 5), torch.randn(4, 3)).numel() == 0


def test_at_a_number_of_components_no_other_choice_loses_less(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Eckart and Young in each module, and all ways to spread the ranks over the modules."""
    spectra = spectra_of(pairs)
    dense = [b.double() @ a.double() for a, b in pairs]
    full = [torch.linalg.svdvals(delta) for delta in dense]
    ways = list(product(*(range(rank + 1) for rank in spectra.stored)))
    for count in (1, 4, 9, 13):
        choice = within(spectra, Target(count, by_cost=False), "energy")
        assert sum(choice.ranks) == count
        least = min(
            sum(float(v[rank:].square().sum()) for v, rank in zip(full, way, strict=True))
            for way in ways
            if sum(way) == count
        )
        assert sum(choice.lost) == pytest.approx(least, rel=1e-9)
        cuts = [truncated(a, b, rank) for (a, b), rank in zip(pairs, choice.ranks, strict=True)]
        errors = [float((d - b.double() @ a.double()).norm()) for d, (a, b) in zip(dense, cuts, strict=True)]
        whole = sum(float(d.square().sum()) for d in dense)
        assert choice.error == pytest.approx((sum(e * e for e in errors) / whole) ** 0.5, rel=1e-4)
        assert choice.energy == pytest.approx(1 - sum(e * e for e in errors) / whole, rel=1e-4)
        relative = [e / float(d.norm()) for e, d in zip(errors, dense, strict=True)]
        assert choice.errors == pytest.approx(relative, rel=1e-4, abs=1e-6)


def test_a_number_of_parameters_is_never_exceeded_and_more_never_lose_more(
    pairs: list[tuple[Tensor, Tensor]],
) -> None:
    spectra = spectra_of(pairs)
    last = sum(spectra.energies)
    for most in range(min(spectra.costs), spectra.parameters + 1):
        choice = within(spectra, Target(most, by_cost=True), "energy_per_parameter")
        assert 0 < choice.parameters <= most
        left = [c for c, kept, all_ in zip(spectra.costs, choice.ranks, spectra.ranks, strict=True) if kept < all_]
        assert not left or choice.parameters + min(left) > most, "something still fits"
        assert sum(choice.lost) <= last + 1e-12
        last = sum(choice.lost)
    assert last == 0 and choice.ranks == spectra.ranks


def test_by_parameters_a_cheap_component_comes_before_a_dear_one() -> None:
    one, two = torch.tensor([2.0, 1.0]).double(), torch.tensor([2.2, 1.1]).double()
    spectra = Spectra(["cheap", "dear"], [2, 2], [10, 40], [one, two])
    assert within(spectra, Target(50, by_cost=True), "energy_per_parameter").ranks == [1, 1]
    assert within(spectra, Target(20, by_cost=True), "energy_per_parameter").ranks == [2, 0]
    assert within(spectra, Target(1, by_cost=False), "energy").ranks == [0, 1]
    assert reaching(spectra, 0.36, "energy").ranks == [0, 1]
    assert reaching(spectra, 0.36, "energy_per_parameter").ranks == [1, 0]


@pytest.mark.parametrize("rank_by", ["energy", "energy_per_parameter"])
def test_a_share_of_the_energy_is_reached_by_no_less(rank_by: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    spectra = spectra_of(pairs)
    whole = within(spectra, Target(spectra.parameters, by_cost=True), rank_by)
    assert reaching(spectra, 1.0, rank_by).ranks == whole.ranks == spectra.ranks
    for share in (0.01, 0.5, 0.9, 0.99, 0.9999):
        choice = reaching(spectra, share, rank_by)
        assert choice.energy >= share
        dropped = []  # the last that was taken is the least of what was kept, and without it there is too little
        for m, rank in enumerate(choice.ranks):
            if rank:
                less = [*choice.ranks[:m], rank - 1, *choice.ranks[m + 1 :]]
                dropped.append(Choice(spectra, less).energy)
        assert max(dropped) < share if rank_by == "energy" else min(dropped) < share


def test_ties_go_to_the_first_module() -> None:
    same = torch.tensor([3.0, 1.0, 1.0]).double()
    spectra = Spectra(["x", "y", "z"], [3, 3, 3], [10, 10, 10], [same, same, same])
    for rank_by in ("energy", "energy_per_parameter"):
        ranks = [within(spectra, Target(k, by_cost=False), rank_by).ranks for k in (1, 2, 4, 6)]
        assert ranks == [[1, 0, 0], [1, 1, 0], [2, 1, 1], [3, 2, 1]]
    assert within(spectra, Target(45, by_cost=True), "energy").ranks == [2, 1, 1]


def test_one_rank_for_all_is_the_largest_that_fits_or_the_smallest_that_reaches() -> None:
    values = [torch.tensor(v).double() for v in ([3.0, 2.0, 1.0], [2.0])]
    spectra = Spectra(["x", "y"], [3, 2], [10, 20], values)
    choice = one_rank_within(spectra, Target(89, by_cost=True))
    assert (choice.ranks, choice.parameters) == ([2, 1], 60)  # the second is filled up with zeros
    assert one_rank_within(spectra, Target(2, by_cost=False)).ranks == [1, 1]
    with pytest.raises(UserError, match="needs 30, a component in every module"):
        one_rank_within(spectra, Target(29, by_cost=True))
    assert one_rank_reaching(spectra, 13 / 18).ranks == [1, 1]
    assert one_rank_reaching(spectra, 0.73).ranks == [2, 1]
    assert one_rank_reaching(spectra, 1.0).ranks == [3, 1]


def test_what_a_budget_comes_to() -> None:
    spectra = Spectra(["x", "y"], [10, 20], [7, 10], [torch.ones(10).double(), torch.ones(20).double()])

    def asked(text: str) -> Target:
        budget = parse_budget(text)
        assert budget is not None
        return limit(budget, spectra, n_targets=4)

    assert asked("0.7") == Target(189, by_cost=True)  # of 270; a float's product is a little less
    assert asked("0.5") == Target(135, by_cost=True)
    assert asked("r2.5") == Target(10, by_cost=False)
    assert asked("0.2k") == Target(200, by_cost=True)
    for text, message in (("r8", "32 of 30 components"), ("271", "271 of 270 parameters"), ("6", "no component")):
        with pytest.raises(UserError, match=message):
            asked(text)
