"""Pruning of principal components: what goes is the least that any choice of ranks could lose."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from dora_cli.adapters.components import Components
from dora_cli.adapters.lora import Lora, LoraLayer
from dora_cli.allocation.allocators.prune_principal import PrunePrincipal
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.component_norm import ComponentNorm
from dora_cli.allocation.importance.energy import Energy
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.rules import check
from dora_cli.allocation.schedules import CubicEarly, Linear
from dora_cli.errors import UserError

SHAPES = {"small": (6, 5), "wide": (20, 16), "tall": (30, 5)}  # (d_out, d_in)
RANK = 4


def layers() -> dict[str, LoraLayer]:
    torch.manual_seed(0)
    made = {}
    for i, (name, (d_out, d_in)) in enumerate(SHAPES.items()):
        a, b = torch.randn(RANK, d_in), torch.randn(d_out, RANK) * (i + 1)
        made[name] = LoraLayer(nn.Linear(d_in, d_out), a, b, None, 1.0 + i, 0.0)
    return made


def pruned(made: dict[str, LoraLayer], target: Target, **options: object) -> tuple[Allocation, dict[str, Any]]:
    allocation = Allocation(
        made,
        schedule=CubicEarly(start=0, end=1.0),
        importance=Energy(),
        allocator=PrunePrincipal(interval=1, **options),  # type: ignore[arg-type]
        regularizer=NoRegularizer(),
        total_steps=1,
        target=target,
    )
    optimizer = torch.optim.AdamW([p for layer in made.values() for p in (layer.a, layer.b)], lr=0.0)
    allocation.after_backward(1)
    event = allocation.after_step(1, optimizer)
    assert event is not None
    return allocation, event


@pytest.mark.parametrize("limit", [1, 5, 9])
def test_of_all_ranks_that_fit_a_number_of_components_it_takes_the_best(limit: int) -> None:
    made = layers()
    before = {name: layer.delta_weight() for name, layer in made.items()}
    pruned(made, Target(limit, by_cost=False))
    lost = sum(float((before[n] - made[n].delta_weight()).square().sum()) for n in made)
    tails = [
        [float(torch.linalg.svdvals(w)[r:].square().sum()) for r in range(RANK + 1)] for w in before.values()
    ]  # Eckart and Young: the least that rank r can lose
    best = min(
        sum(tail[r] for tail, r in zip(tails, ranks, strict=True))
        for ranks in product(range(RANK + 1), repeat=len(tails))
        if sum(ranks) == limit
    )
    assert lost == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("cost_aware", [True, False])
def test_under_a_budget_of_parameters_what_counts_is_energy_per_parameter(cost_aware: bool) -> None:
    made = layers()
    sizes = {n: torch.linalg.svdvals(layer.delta_weight())[:RANK].square() for n, layer in made.items()}
    costs = {n: sum(shape) for n, shape in SHAPES.items()}
    limit = 110
    worth = sorted(((float(s) / (costs[n] if cost_aware else 1), n) for n in sizes for s in sizes[n]), reverse=True)
    expected, spent = dict.fromkeys(SHAPES, 0), 0
    for _, name in worth:
        spent += costs[name]
        if spent > limit:
            break
        expected[name] += 1
    allocation, event = pruned(made, Target(limit, by_cost=True), cost_aware=cost_aware)
    assert allocation.table.ranks() == expected
    line = event["standing"]  # of what was ranked
    assert line["lowest_kept"] >= line["highest_lost"]
    assert allocation.table.alive_cost() <= limit


def test_what_lives_stays_whole_whichever_components_were_dropped_before() -> None:
    """Rows of dropped components stay for a while, here in the middle: nothing that lives may land on them."""
    made = layers()
    allocation = Allocation(
        made,
        schedule=Linear(start=0, end=1.0),
        importance=Random(),
        allocator=PrunePrincipal(interval=1),
        regularizer=NoRegularizer(),
        total_steps=6,
        target=Target(6, by_cost=False),
    )
    optimizer = torch.optim.AdamW([p for layer in made.values() for p in (layer.a, layer.b)], lr=0.0)
    for step in range(1, 7):
        allocation.after_step(step, optimizer)
        found = [int((torch.linalg.svdvals(layer.delta_weight()) > 1e-3).sum()) for layer in made.values()]
        assert found == list(allocation.table.ranks().values())


def test_energy_counts_the_scale_and_sees_how_large_a_module_s_update_is() -> None:
    made = layers()
    allocation, _ = pruned(made, Target(12, by_cost=False))  # nothing goes
    scores = Energy().scores(allocation.table, None)
    for m, layer in enumerate(made.values()):
        sizes = torch.linalg.svdvals(layer.delta_weight())[:RANK].square()
        assert torch.allclose(scores[allocation.table.rows[m]], sizes, rtol=1e-4)


def test_adapters_and_scores_that_do_not_fit_are_refused() -> None:
    names = {"adapter": "lora", "importance": "component_norm", "allocator": "prune_principal"}
    names |= {"schedule": "cubic_early", "regularizer": "none"}
    with pytest.raises(UserError, match="do not go together") as error:
        check(Lora, ComponentNorm, CubicEarly, PrunePrincipal, NoRegularizer, names)
    assert "importance=energy" in str(error.value.hint)
    with pytest.raises(UserError, match="do not go together") as error:
        check(Components, Energy, CubicEarly, PrunePrincipal, NoRegularizer, names | {"adapter": "components"})
    assert "adapters that can: lora" in str(error.value.hint)
