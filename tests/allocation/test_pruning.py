"""Counts, ties, revival, compaction and growth: what an allocator may rely on."""

from typing import Any

import pytest
import torch
from torch import nn

from dora_cli.adapters.inject import parameter_groups
from dora_cli.adapters.lora import Lora
from dora_cli.allocation.allocators.none import NoAllocator
from dora_cli.allocation.allocators.prune import Prune
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.component_norm import ComponentNorm
from dora_cli.allocation.importance.none import NoImportance
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import Constant, CubicLate, Linear
from dora_cli.allocation.select import top
from dora_cli.allocation.table import UnitTable


class Run:
    """A tiny regression trained with an allocation, one step at a time."""

    def __init__(self, model: nn.Module, layers: dict[str, Any], *, lr: float = 1e-2, **parts: Any) -> None:
        self.model, self.layers = model, layers
        parts = {
            "schedule": CubicLate(),
            "importance": ComponentNorm(),
            "allocator": Prune(interval=5),
            "regularizer": NoRegularizer(),
            "total_steps": 60,
            "target": Target(8, by_cost=False),
        } | parts
        self.allocation = Allocation(layers, **parts)
        self.optimizer = torch.optim.AdamW(parameter_groups(layers, lr=lr, weight_decay=0.01), fused=True)
        g = torch.Generator().manual_seed(5)
        width = next(iter(layers.values())).d_in
        self.x = torch.randn(64, width, generator=g)
        self.y = torch.randn(64, width, generator=g)

    def step(self, t: int) -> dict[str, Any] | None:
        loss = (self.model(self.x) - self.y).square().mean()
        loss.backward()
        self.allocation.after_backward(t)
        self.optimizer.step()
        event = self.allocation.after_step(t, self.optimizer)
        self.optimizer.zero_grad()
        return event


def test_counts_equal_the_schedule_at_every_event_and_the_budget_from_the_end_on(stack: Any) -> None:
    run = Run(*stack(n=4, rank=6))
    window = run.allocation.window
    events = []
    for t in range(1, 61):
        event = run.step(t)
        if event:
            events.append(t)
            expected = 8 + round(16 * (1 - window.x(t) ** 3))
            assert event["alive"] == event["budget"] == expected == sum(event["ranks"].values())
        if t >= window.end:
            living = sum(int((layer.c != 0).sum()) for layer in run.layers.values())
            assert living == sum(layer.rank for layer in run.layers.values()) == 8
    assert events == [9, 14, 19, 24, 29, 30]  # start + 5k, and always the end


def test_ties_break_by_module_then_order_and_never_overshoot(stack: Any) -> None:
    _, layers = stack(n=3, rank=4)
    table = UnitTable(layers)
    keep = top(table, torch.zeros(12), 5, by_cost=False)
    assert torch.nonzero(keep).flatten().tolist() == [0, 1, 2, 3, 4]
    keep = top(table, torch.tensor([0, 1] * 6).float(), 7, by_cost=False)
    assert torch.nonzero(keep).flatten().tolist() == [0, 1, 3, 5, 7, 9, 11]


def test_all_scores_equal_still_ends_exactly_on_budget(stack: Any) -> None:
    run = Run(*stack(n=4, rank=6, shake=False), lr=1e-12)  # c stays ≈ 0: every score ties
    for t in range(1, 61):
        event = run.step(t)
        if event:
            assert event["alive"] == event["budget"]
    assert run.allocation.alive_count() == 8


def test_nan_scores_are_the_first_to_go(stack: Any) -> None:
    _, layers = stack(n=1, rank=4)
    keep = top(UnitTable(layers), torch.tensor([float("nan"), 0.0, 2.0, 1.0]), 3, by_cost=False)
    assert keep.tolist() == [False, True, True, True]


def test_min_rank_is_kept_in_every_module(stack: Any) -> None:
    _, layers = stack(n=3, rank=4)
    table = UnitTable(layers)
    scores = torch.arange(12).float()  # the last module is the best by far
    keep = top(table, scores, 5, by_cost=False, min_rank=1)
    assert torch.nonzero(keep).flatten().tolist() == [3, 7, 9, 10, 11]
    assert torch.bincount(table.module[keep], minlength=3).tolist() == [1, 1, 3]


def test_a_parameter_budget_keeps_the_largest_prefix_that_fits() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 16))
    from dora_cli.adapters.inject import inject

    table = UnitTable(inject(model, ["0", "1"], Lora(), [3, 3]))  # costs 8 and 20
    scores = torch.tensor([6.0, 4.0, 2.0, 5.0, 3.0, 1.0])  # ranking: 8, 20, 8, 20, 8, 20
    assert torch.nonzero(top(table, scores, 37, by_cost=True)).flatten().tolist() == [0, 1, 3]
    assert int(table.cost[top(table, scores, 55, by_cost=True)].sum()) == 36  # 56 would need one more


def test_a_silenced_component_moves_again_before_the_end_and_never_after(stack: Any) -> None:
    model, layers = stack(n=4, rank=6)
    run = Run(model, layers, allocator=Prune(interval=50), importance=Random(), schedule=Linear(start=10, end=30))
    for t in range(1, 12):
        run.step(t)
    table = run.allocation.table
    table.keep(table.module > 0, final=False)  # silence the whole first module at step 11
    assert bool((layers["0"].c == 0).all())
    run.step(12)
    assert bool((layers["0"].c != 0).all())  # revived: it stayed trainable
    for t in range(13, 61):
        run.step(t)
    assert sum(layer.rank for layer in layers.values()) == 8
    assert run.allocation.alive_count() == 8


def test_without_revival_a_pruned_component_stays_at_zero_although_adam_pushes(stack: Any) -> None:
    model, layers = stack(n=4, rank=6)
    run = Run(model, layers, allocator=Prune(interval=5, revive=False), schedule=Linear(start=5, end=55))
    gone: set[int] = set()
    for t in range(1, 61):
        run.step(t)
        table = run.allocation.table
        assert gone <= set(torch.nonzero(table.dropped).flatten().tolist())
        gone = set(torch.nonzero(table.dropped).flatten().tolist())
        for m, layer in enumerate(layers.values()):
            dead = table.dropped[table.rows[m]]
            assert bool((layer.c[dead] == 0).all())
    assert run.allocation.table.compactions >= 2  # lazily before the end, and at it
    assert len(gone) == 16


def test_compaction_changes_no_output(stack: Any) -> None:
    model, layers = stack(n=3, rank=8, width=32)
    table = UnitTable(layers)
    x = torch.randn(10, 32)
    mask = torch.rand(24, generator=torch.Generator().manual_seed(1)) < 0.5
    table.keep(mask, final=True)
    before = model(x)
    deltas = {n: layer.delta_weight() for n, layer in layers.items()}
    assert table.compact()
    assert sum(layer.rank for layer in layers.values()) == int(mask.sum())
    assert torch.allclose(model(x), before, atol=1e-6)
    for name, layer in layers.items():
        assert torch.allclose(layer.delta_weight(), deltas[name], atol=1e-6)


def test_a_module_where_nothing_lives_becomes_its_base_layer(stack: Any) -> None:
    model, layers = stack(n=2, rank=2)
    base = layers["0"].base_layer
    allocation = Allocation(
        layers,
        schedule=Linear(start=0, end=1),
        importance=Random(),
        allocator=Prune(),
        regularizer=NoRegularizer(),
        total_steps=4,
        target=Target(2, by_cost=False),
    )
    from dora_cli.adapters.inject import remove

    allocation.on_empty(lambda name: remove(model, name))
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=1e-3, weight_decay=0.0))
    allocation.importance.smoothed = torch.tensor([0.0, 0.0, 1.0, 1.0])  # type: ignore[attr-defined]
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    allocation.after_step(1, optimizer)
    assert model[0] is base  # type: ignore[index]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3  # the other module's a, b, c


def test_growth_leaves_the_function_and_the_old_moments_alone(stack: Any) -> None:
    model, layers = stack(n=2, rank=3, part=Lora())
    run = Run(model, layers, importance=NoImportance(), allocator=NoAllocator(), schedule=Constant(), target=None)
    for t in range(1, 6):
        run.step(t)
    x = torch.randn(7, 16)
    before, moment = model(x), run.optimizer.state[layers["0"].a]["exp_avg"].clone()
    new = run.allocation.table.grow(0, 2, run.optimizer)
    assert new.tolist() == [6, 7]
    assert layers["0"].rank == 5
    assert torch.allclose(model(x), before, atol=1e-6)
    state = run.optimizer.state[layers["0"].a]["exp_avg"]
    assert torch.equal(state[:3], moment)
    assert not bool(state[3:].any())
    run.step(6)
    assert bool((layers["0"].b[:, 3:] != 0).any())  # the new ones train


def test_the_same_run_twice_decides_the_same(stack: Any) -> None:
    histories = []
    for _ in range(2):
        run = Run(*stack(n=4, rank=6))
        histories.append([run.step(t) for t in range(1, 61)])
    assert histories[0] == histories[1]


@pytest.mark.parametrize("compacts", [True, False])
def test_saved_state_goes_on_bit_for_bit(stack: Any, compacts: bool) -> None:
    split = 45 if compacts else 20
    whole = Run(*stack(n=4, rank=6))
    for t in range(1, split + 1):
        whole.step(t)
    state = whole.allocation.state_dict()
    values = {n: {k: p.detach().clone() for k, p in la.adapter_parameters().items()} for n, la in whole.layers.items()}
    moments = {
        (n, k): {s: v.clone() for s, v in whole.optimizer.state[p].items()}
        for n, la in whole.layers.items()
        for k, p in la.adapter_parameters().items()
    }
    resumed = Run(*stack(n=4, rank=6, seed=0))
    resumed.allocation.load_state_dict(state)
    for name, layer in resumed.layers.items():
        for key, parameter in layer.adapter_parameters().items():
            assert parameter.shape == values[name][key].shape
            parameter.data.copy_(values[name][key])
    resumed.optimizer = torch.optim.AdamW(parameter_groups(resumed.layers, lr=1e-2, weight_decay=0.01), fused=True)
    for name, layer in resumed.layers.items():
        for key, parameter in layer.adapter_parameters().items():
            resumed.optimizer.state[parameter] = {s: v.clone() for s, v in moments[name, key].items()}
    for t in range(split + 1, 61):
        assert whole.step(t) == resumed.step(t)
    for name in whole.layers:
        for key, parameter in whole.layers[name].adapter_parameters().items():
            assert torch.equal(parameter, resumed.layers[name].adapter_parameters()[key])
