"""ElaLoRA: who is nominated, who moves, that the total and the function stay, and what new components look like."""

from typing import Any

import pytest
import torch
from torch import nn

from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.adapters.svd import Svd, orthogonal_rows
from dora_cli.allocation.allocators.exchange import Exchange
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.importance.sensitivity import Sensitivity
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import Constant


class Fixed(Random):
    """Scores that a test sets; units born later are worth nothing."""

    values: torch.Tensor

    def scores(self, table: Any, probe: Any) -> torch.Tensor:
        return torch.cat([self.values, torch.zeros(len(table) - len(self.values))])


def joined(layers: Any, importance: Any, *, total: int = 12, by_cost: bool = False, **options: Any) -> Allocation:
    return Allocation(
        layers,
        schedule=Constant(start=0, end=100),
        importance=importance,
        allocator=Exchange(interval=10, **options),
        regularizer=NoRegularizer(),
        total_steps=100,
        target=Target(total, by_cost=by_cost),
    )


def optimizer_of(layers: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(layers, lr=1e-2, weight_decay=0.0), fused=True)


def test_the_worst_nominees_go_and_owners_of_the_best_nominees_gain(stack: Any) -> None:
    _, layers = stack(n=3, rank=4, part=Svd())
    fixed = Fixed()
    allocation = joined(layers, fixed, moves=2, nominees=2)
    #                   module 0: nominees 9, 8       module 1: 2, 1           module 2: 6, 5
    fixed.values = torch.tensor([12.0, 11, 9, 8, 10, 4, 2, 1, 20, 19, 6, 5])
    event = allocation.after_step(10, optimizer_of(layers))
    assert event is not None
    # pool, best first: 9 (m0), 8 (m0), 6, 5 (m2), 2, 1 (m1): the two of module 1 go, module 0 gains twice
    assert event["ranks"] == {"0": 6, "2": 2, "4": 4}
    assert event["alive"] == 12


def test_no_module_ever_nominates_all_that_it_has(stack: Any) -> None:
    _, layers = stack(n=2, rank=2, part=Svd())
    fixed = Fixed()
    allocation = joined(layers, fixed, moves=4, nominees=9)
    fixed.values = torch.tensor([0.4, 0.3, 0.2, 0.1])
    optimizer = optimizer_of(layers)
    for t in (10, 20, 30, 40):
        event = allocation.after_step(t, optimizer)
        assert event is not None
        assert min(event["ranks"].values()) >= 1
        assert event["alive"] == 4


def test_moves_fade_to_none_at_the_end_of_the_window(stack: Any) -> None:
    _, layers = stack(n=4, rank=6, part=Svd())
    allocation = joined(layers, Random(), moves=4)
    optimizer = optimizer_of(layers)
    born = []
    for t in range(0, 101, 10):
        before = len(allocation.table)
        if t:
            allocation.after_step(t, optimizer)
            born.append(len(allocation.table) - before)
    assert born == [round(4 * (1 - (t / 100) ** 3)) for t in range(10, 101, 10)]
    assert born[-1] == 0


def test_the_total_is_constant_in_parameters_too(stack: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8))
    layers = inject(model, ["0", "1", "2"], Svd(), [4, 4, 4])
    start = sum(sum(layer.unit_costs()) for layer in layers.values())
    allocation = joined(layers, Random(), total=start, by_cost=True, moves=3)
    optimizer = optimizer_of(layers)
    costs = []
    for t in range(10, 101, 10):
        event = allocation.after_step(t, optimizer)
        assert event is not None
        costs.append(event["params"])
    assert max(costs) <= start
    assert min(costs) > start - 32  # what is left over would not pay for one more of the dearer components


def test_an_exchange_takes_away_what_is_dropped_and_adds_nothing_to_the_function(stack: Any) -> None:
    model, layers = stack(n=3, rank=4, part=Svd())
    fixed = Fixed()
    allocation = joined(layers, fixed, moves=2)
    fixed.values = torch.tensor([12.0, 11, 9, 8, 10, 4, 2, 1, 20, 19, 6, 5])
    with torch.no_grad():
        layers["2"].c[2:] = 0.0  # the two that will go carry nothing
    x = torch.randn(5, 16)
    before = model(x)
    allocation.after_step(10, optimizer_of(layers))
    assert torch.allclose(model(x), before, atol=1e-6)


def test_new_rows_are_orthonormal_and_orthogonal_to_those_that_are_there() -> None:
    torch.manual_seed(1)
    existing = torch.randn(3, 10)
    rows = orthogonal_rows(4, existing)
    assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-5)
    assert float((rows @ existing.T).abs().max()) < 1e-5
    full = orthogonal_rows(2, torch.eye(3))  # no room left: still unit rows
    assert torch.allclose(full.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(orthogonal_rows(2, torch.empty(0, 5)).norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_training_moves_ranks_to_where_the_task_needs_them(stack: Any, seed: int) -> None:
    """Only module 4 has anything to learn: the others' targets are what they give already."""
    torch.manual_seed(seed)
    model = nn.ModuleList([nn.Linear(12, 12, bias=False) for _ in range(4)])
    model.requires_grad_(False)
    x = torch.randn(128, 12)
    wanted = [x @ m.weight.T.detach() for m in model]
    wanted[3] = wanted[3] + x @ (torch.randn(12, 12) * 0.5)
    layers = inject(model, ["0", "1", "2", "3"], Svd(), [3] * 4)
    allocation = joined(layers, Sensitivity(), moves=3)
    optimizer = optimizer_of(layers)
    event: Any = None
    for t in range(1, 101):
        loss = sum((m(x) - y).square().mean() for m, y in zip(model, wanted, strict=True))
        loss.backward()
        allocation.after_backward(t)
        optimizer.step()
        event = allocation.after_step(t, optimizer) or event
        optimizer.zero_grad()
    assert event["ranks"]["3"] > max(event["ranks"][n] for n in ("0", "1", "2"))
    assert event["alive"] == 12
