"""SoRA: the proximal map, its effect on gates, the exact budget at the end, and what would close everything."""

from typing import Any

import pytest
import torch

from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import parameter_groups
from dora_cli.allocation.allocators.soft_threshold import SoftThreshold
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.gate_size import GateSize
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import OneShot
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError


def opened(stack: Any, **options: Any) -> Any:
    """An adapted stack with SoRA's start."""
    part = Components(init="open_gates", **options)
    model, layers = stack(part=part, shake=False)
    for name, layer in layers.items():
        part.start().fill(name, layer)  # type: ignore[union-attr]
    return model, layers


def test_the_step_is_the_proximal_map_of_the_absolute_value(stack: Any) -> None:
    _, layers = opened(stack)
    layer = layers["0"]
    with torch.no_grad():
        layer.c.copy_(torch.tensor([0.5, 1.5, -2.5, 1.0, -0.2, 0.0]))
    window = OneShot(end=10).window(20)
    SoftThreshold(threshold=1.0).after_step(UnitTable(layers), 1, window)
    assert layer.c.tolist() == pytest.approx([0.0, 0.5, -1.5, 0.0, 0.0, 0.0])  # METHODS 0.8: 1.5ξ becomes 0.5ξ
    SoftThreshold(threshold=1.0).after_step(UnitTable(layers), 11, window)  # after the final choice gates are free
    assert layer.c.tolist() == pytest.approx([0.0, 0.5, -1.5, 0.0, 0.0, 0.0])
    # the map minimises ½(z − g)² + ξ|z|, by brute force
    g, grid = 1.3, torch.linspace(-3, 3, 60001)
    best = grid[(0.5 * (grid - g) ** 2 + 0.4 * grid.abs()).argmin()]
    with torch.no_grad():
        layer.c.fill_(g)
    SoftThreshold(threshold=0.4).after_step(UnitTable(layers), 1, window)
    assert float(layer.c[0].detach()) == pytest.approx(float(best), abs=1e-3)


def test_the_start_is_the_identity_with_open_gates_that_differ(stack: Any) -> None:
    model, layers = opened(stack)
    x = torch.randn(3, 16)
    plain = x
    for module in model:
        plain = getattr(module, "base_layer", module)(plain)
    assert torch.equal(model(x), plain)
    gates = torch.cat([layer.c.detach() for layer in layers.values()])
    assert gates.abs().min() > 0 and 0.5 < gates.std() < 1.6
    assert all(float(layer.a.detach().abs().max()) <= 16**-0.5 for layer in layers.values())


def trained(stack: Any, threshold: float, *, steps: int = 60, last: int = 8) -> tuple[Allocation, int]:
    """Train on a fixed regression; returns the allocation and how many gates were closed just before the end."""
    model, layers = opened(stack)
    allocation = Allocation(
        layers,
        schedule=OneShot(end=40),
        importance=GateSize(),
        allocator=SoftThreshold(threshold=threshold),
        regularizer=NoRegularizer(),
        total_steps=steps,
        target=Target(last, by_cost=False),
    )
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=1e-2, weight_decay=0.0), fused=True)
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(64, 16, generator=g), torch.randn(64, 16, generator=g)
    closed, events = 0, []
    for t in range(1, steps + 1):
        (model(x) - y).square().mean().backward()
        allocation.after_backward(t)
        optimizer.step()
        event = allocation.after_step(t, optimizer)
        optimizer.zero_grad()
        if event:
            events.append(event["step"])
        if t == 39:
            closed = sum(int((layer.c == 0).sum()) for layer in layers.values())
    assert events == [40]
    return allocation, closed


def test_more_threshold_closes_more_gates_and_the_end_keeps_exactly_the_budget(stack: Any) -> None:
    closed = []
    for threshold in (0.0, 1e-2, 3e-2):
        allocation, n = trained(stack, threshold)
        closed.append(n)
        assert allocation.alive_count() == 8
        assert sum(layer.rank for layer in allocation.table.layers) == 8
    assert closed == sorted(closed) and closed[0] == 0 < closed[-1]


def test_the_largest_gates_are_the_ones_that_stay(stack: Any) -> None:
    _, layers = opened(stack)
    table = UnitTable(layers)
    scores = GateSize().scores(table, None)
    assert torch.equal(scores, torch.cat([layer.c.detach().abs() for layer in layers.values()]))


def test_a_threshold_that_would_close_everything_is_refused() -> None:
    SoftThreshold(threshold=3e-4).check(8e-4, OneShot(), None)
    with pytest.raises(UserError, match=r"allocator\.threshold=0\.001 would close every gate") as error:
        SoftThreshold(threshold=1e-3).check(1e-3, OneShot(), None)
    assert "train.learning_rate=0.001" in str(error.value.where)
