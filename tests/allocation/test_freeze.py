"""AFLoRA's freezing: both rules, what leaves the optimizer, and that the frozen stay frozen and bitwise the same."""

from typing import Any

import pytest
import torch
from torch import nn

from dora_cli.adapters.aflora import Aflora
from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.allocation.allocators.freeze import Freeze
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.freezing_score import FreezingScore
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import CubicEarly, Linear
from dora_cli.allocation.table import UnitTable


class Given(Random):
    """Element scores that a test sets; a unit's score is their mean."""

    values: list[torch.Tensor]

    def scores(self, table: Any, probe: Any) -> torch.Tensor:
        return torch.stack([v.mean() for v in self.values])

    def elements(self, table: Any, probe: Any) -> list[torch.Tensor]:
        return self.values


def joined(layers: Any, importance: Any, schedule: Any, *, total: int = 50, **options: Any) -> Allocation:
    return Allocation(
        layers,
        schedule=schedule,
        importance=importance,
        allocator=Freeze(**({"interval": 5} | options)),
        regularizer=NoRegularizer(),
        total_steps=total,
        units="tensors",
    )


def optimizer_of(layers: Any, weight_decay: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(layers, lr=1e-2, weight_decay=weight_decay), fused=True)


def unit_tensors(table: UnitTable) -> list[nn.Parameter]:
    return [t for layer in table.layers for t in layer.unit_tensors()]


def test_it_is_the_identity_at_the_start_and_its_lora_pair_is_its_forward() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 20)
    model = nn.Sequential(base)
    x = torch.randn(9, 12)
    before = model(x)
    layer = inject(model, ["0"], Aflora(), [3])["0"]
    assert torch.equal(model(x), before)
    with torch.no_grad():
        layer.s_b.normal_()
        layer.s_d.normal_()
    a, b = layer.low_rank()
    assert (a.shape, b.shape) == ((3, 12), (20, 3))
    assert not torch.allclose(model(x), before)
    assert torch.allclose(model(x), before + x @ a.T @ b.T, atol=1e-6)


def test_square_projections_start_frozen_unless_asked_otherwise() -> None:
    for freeze_square in (True, False):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12))
        layers = inject(model, ["0", "1"], Aflora(freeze_square=freeze_square), [2, 2])
        table = UnitTable(layers, "tensors")
        assert table.frozen.tolist() == [freeze_square] * 2 + [False] * 2
        assert joined(layers, Random(), CubicEarly()).first == (2 if freeze_square else 4)


@pytest.mark.parametrize("rule", ["exact", "quantile"])
def test_the_frozen_set_only_grows_stays_bitwise_and_is_everything_at_the_end(stack: Any, rule: str) -> None:
    model, layers = stack(n=4, width=12, rank=2, part=Aflora(freeze_square=False))
    allocation = joined(layers, FreezingScore(window=5), CubicEarly(start=10, end=40), rule=rule)
    optimizer = optimizer_of(layers)
    table, tensors = allocation.table, unit_tensors(allocation.table)
    x, y = torch.randn(16, 12), torch.randn(16, 12)
    frozen: dict[int, torch.Tensor] = {}
    counts = []
    for step in range(1, 51):
        (model(x) - y).square().mean().backward()
        allocation.after_backward(step)
        optimizer.step()
        event = allocation.after_step(step, optimizer)
        optimizer.zero_grad(set_to_none=True)
        for unit, values in frozen.items():
            assert bool(table.frozen[unit])
            assert torch.equal(tensors[unit], values), "a frozen tensor has moved, if only by weight decay"
        in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for unit, tensor in enumerate(tensors):
            if bool(table.frozen[unit]):
                frozen.setdefault(unit, tensor.detach().clone())
                assert id(tensor) not in in_optimizer
                assert tensor not in optimizer.state
                assert not tensor.requires_grad
            else:
                assert id(tensor) in in_optimizer
        if event:
            counts.append(event["alive"])
            scheduled = round(8 * (1 - min(max((step - 10) / 30, 0.0), 1.0)) ** 3)
            assert event["budget"] == scheduled
            if rule == "exact":
                assert event["alive"] == scheduled
    assert counts[-1] == 0 == int((~table.frozen).sum())
    assert counts == sorted(counts, reverse=True)
    assert len(in_optimizer) == 8, "s_d and s_b of four layers train to the end"


def test_exact_takes_the_lowest_scores(stack: Any) -> None:
    _, layers = stack(n=2, width=8, rank=2, part=Aflora(freeze_square=False))
    given = Given()
    given.values = [torch.tensor([v]) for v in (4.0, 1.0, 2.0, 3.0)]
    allocation = joined(layers, given, Linear(start=0, end=20))
    optimizer = optimizer_of(layers)
    seen = []
    for step in (5, 10, 15, 20):
        allocation.after_step(step, optimizer)
        seen.append(allocation.table.frozen.tolist())
    assert seen == [
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
        [True, True, True, True],
    ]


def test_quantile_pools_the_elements_of_all_that_still_trains(stack: Any) -> None:
    """ρ = ¼ of 8 elements is the second smallest, 2; ρ = ½ of the 6 that are left is the third, 3."""
    _, layers = stack(n=2, width=8, rank=2, part=Aflora(freeze_square=False))
    given = Given()
    # means                     1.5                       2.5                       50                        6
    given.values = [torch.tensor(v) for v in ([1.0, 2.0], [2.5, 2.5], [3.0, 97.0], [4.0, 8.0])]
    allocation = joined(layers, given, Linear(start=0, end=20), rule="quantile")
    optimizer = optimizer_of(layers)
    allocation.after_step(5, optimizer)
    assert allocation.table.frozen.tolist() == [True, False, False, False]
    allocation.after_step(10, optimizer)
    assert allocation.table.frozen.tolist() == [True, True, False, False]
    allocation.after_step(15, optimizer)  # ¾ of 4 elements: the third smallest is 8, above the mean of 6
    assert allocation.table.frozen.tolist() == [True, True, False, True]
    allocation.after_step(20, optimizer)
    assert allocation.table.frozen.tolist() == [True] * 4


def test_quantile_lags_where_means_lie_above_medians(stack: Any) -> None:
    """Heavy-tailed elements: the schedule wants half frozen, and no mean is below the median."""
    _, layers = stack(n=2, width=8, rank=2, part=Aflora(freeze_square=False))
    given = Given()
    given.values = [torch.tensor([1.0, 1.0, 1.0, 10.0 + i]) for i in range(4)]
    for rule, count in (("exact", 2), ("quantile", 4)):
        allocation = joined(layers, given, Linear(start=0, end=20), rule=rule)
        allocation.after_step(10, optimizer_of(layers))
        assert allocation.alive_count() == count
        allocation.table.thaw(torch.ones(4, dtype=torch.bool))


def test_an_importance_of_whole_units_has_one_element_each(stack: Any) -> None:
    _, layers = stack(n=2, width=8, rank=2, part=Aflora(freeze_square=False))
    importance = Random()
    table = UnitTable(layers, "tensors")
    importance.attach(table)
    assert torch.equal(torch.cat(importance.elements(table, None)), importance.scores(table, None))


def test_the_freezing_score_is_its_definition_and_the_mean_of_its_elements(stack: Any) -> None:
    _, layers = stack(n=2, width=6, rank=2, part=Aflora(freeze_square=False))
    table, importance = UnitTable(layers, "tensors"), FreezingScore(window=3, beta=0.8, beta_uncertainty=0.6)
    importance.attach(table)
    tensors = unit_tensors(table)
    g = torch.Generator().manual_seed(0)
    sums = [torch.zeros_like(t) for t in tensors]
    means = [torch.zeros_like(t) for t in tensors]
    spreads = [torch.zeros_like(t) for t in tensors]
    for step in range(1, 8):
        for i, tensor in enumerate(tensors):
            tensor.grad = torch.randn(tensor.shape, generator=g)
            sums[i] = sums[i] + tensor.grad.abs()
            if step % 3 == 0:
                means[i] = 0.8 * means[i] + 0.2 * sums[i] / 3
                spreads[i] = 0.6 * spreads[i] + 0.4 * (sums[i] / 3 - means[i]).abs()
                sums[i] = torch.zeros_like(tensor)
        importance.update(table, step)
    expected = [m * s for m, s in zip(means, spreads, strict=True)]
    for mine, theirs in zip(importance.elements(table, None), expected, strict=True):
        assert torch.allclose(mine, theirs.flatten(), rtol=1e-5)
    assert torch.allclose(importance.scores(table, None), torch.stack([e.mean() for e in expected]), rtol=1e-5)
