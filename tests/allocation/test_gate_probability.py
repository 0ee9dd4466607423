"""Nested gates under an allocator: their scores and prior, kept prefixes, and a first component that never goes."""

from itertools import product
from typing import Any

import pytest
import torch

from dora_cli.adapters.gated import Gated
from dora_cli.adapters.inject import parameter_groups
from dora_cli.adapters.quantise import open_probability
from dora_cli.allocation.allocators.prune import Prune
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.component_norm import ComponentNorm
from dora_cli.allocation.importance.gate_probability import GateProbability
from dora_cli.allocation.importance.gate_size import GateSize
from dora_cli.allocation.importance.gradient import Gradient
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.importance.sensitivity import Sensitivity
from dora_cli.allocation.regularizers.gate_kl import GateKl, expected_rank, penalty
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import Linear, OneShot
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError


def with_logits(stack: Any, n: int = 3, rank: int = 4, width: int = 16, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A gated stack whose logits are all different, and a gradient of zeros at each."""
    model, layers = stack(n=n, rank=rank, width=width, part=Gated(**options), shake=False)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers.values():
            for parameter in (layer.phi, layer.bit_logits):
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 2)
                parameter.grad = torch.zeros_like(parameter)
    return model, layers


def omega(layers: dict[str, Any]) -> torch.Tensor:
    """Ω summed over modules, term by term from METHODS 6, in float64."""
    shift = 2 / 3 * torch.log(torch.tensor(11.0, dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    for layer in layers.values():
        q = torch.sigmoid(layer.bit_logits.double() + shift)
        p = torch.sigmoid(layer.phi.double()[1:] + shift)
        for tensor in range(3):
            terms, reached = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
            for bit in range(q.shape[1]):
                reached = reached * q[tensor, bit]
                terms = terms + reached
            total = total + (terms * p.mean() if tensor == 2 and len(p) else terms)
    return total


# ---- scores -------------------------------------------------------------------------------------------------------


def test_a_score_is_the_chance_that_the_gate_and_all_before_it_are_open(stack: Any) -> None:
    _, layers = with_logits(stack)
    scores = GateProbability().scores(UnitTable(layers), None).reshape(3, 4)
    for layer, found in zip(layers.values(), scores, strict=True):
        p = torch.sigmoid(layer.phi.detach().double() + 1.59860)
        assert found.tolist() == pytest.approx([1.0, *(float(p[1:i].prod()) for i in (2, 3, 4))], rel=1e-4)


def test_gates_far_open_still_differ(stack: Any) -> None:
    _, layers = with_logits(stack, n=2, rank=2)
    with torch.no_grad():
        for layer, phi in zip(layers.values(), (19.0, 20.0), strict=True):
            layer.phi.fill_(phi)
    scores = GateProbability().scores(UnitTable(layers), None)
    assert float(scores[1]) < float(scores[3]) < 1


# ---- who is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [GateProbability, ComponentNorm, Sensitivity, Gradient, GateSize, Random])
@pytest.mark.parametrize("revive", [True, False])
def test_what_is_kept_is_a_prefix_with_the_first_and_exact_whatever_scores(
    stack: Any, importance: Any, revive: bool
) -> None:
    model, layers = stack(n=4, rank=6, part=Gated(), shake=False)
    allocation = Allocation(
        layers,
        schedule=Linear(start=4, end=16),
        importance=importance(),
        allocator=Prune(interval=4, revive=revive),
        regularizer=GateKl(weight=1e-2),
        total_steps=20,
        target=Target(9, by_cost=False),
    )
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=1e-2, weight_decay=0.1), fused=True)
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    for step in range(1, 21):
        (model(x) - y).square().mean().backward()
        allocation.after_backward(step)
        optimizer.step()
        event = allocation.after_step(step, optimizer)
        optimizer.zero_grad()
        if event:
            assert event["alive"] == event["budget"]
            assert min(event["ranks"].values()) >= 1
            table = allocation.table
            for m, rank in enumerate(event["ranks"].values()):
                mine = torch.nonzero(table.alive & (table.module == m)).flatten()
                assert table.order[mine].tolist() == list(range(rank))
    assert [layer.rank for layer in layers.values()] == list(allocation.table.ranks().values())
    assert all(layer.settled and len(layer.phi) == layer.rank for layer in layers.values())  # type: ignore[attr-defined]


def test_the_choice_takes_the_likeliest_prefixes_and_opens_what_it_keeps(stack: Any) -> None:
    model, layers = stack(n=3, rank=4, part=Gated(), shake=False)
    logits = ([9.0, 3.0, 3.0, 3.0], [9.0, -3.0, 9.0, 9.0], [9.0, 1.0, -6.0, 9.0])
    with torch.no_grad():
        for layer, phi in zip(layers.values(), logits, strict=True):
            layer.phi.copy_(torch.tensor(phi))
    allocation = Allocation(
        layers,
        schedule=OneShot(end=1),
        importance=GateProbability(),
        allocator=Prune(),
        regularizer=NoRegularizer(),
        total_steps=2,
        target=Target(8, by_cost=False),
    )
    model.eval()
    assert [int((layer.gates() != 0).sum()) for layer in layers.values()] == [4, 1, 2]  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD([p for layer in layers.values() for p in layer.adapter_parameters().values()], lr=0.0)
    allocation.after_step(1, optimizer)
    # worth: 1 and three of ~0.97; 1, 0.2, 0.2, 0.2; 1, 0.93, 0.01, 0.01. The eighth is a tie of the second's three.
    assert list(allocation.table.ranks().values()) == [4, 2, 2]
    assert [int((layer.gates() != 0).sum()) for layer in layers.values()] == [4, 2, 2]  # type: ignore[attr-defined]


# ---- the prior ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "n_bits"), [(4, 16), (2, 32), (1, 16), (3, 2)])
def test_the_gradient_is_that_of_the_definition(stack: Any, rank: int, n_bits: int) -> None:
    _, layers = with_logits(stack, rank=rank, n_bits=n_bits)
    table, regularizer = UnitTable(layers), GateKl(weight=0.3)
    regularizer.attach(table)
    assert regularizer.value(table) == pytest.approx(float(omega(layers).detach()), rel=1e-5)
    regularizer.after_backward(table)
    for layer in layers.values():
        for name in ("phi", "bit_logits"):
            parameter = getattr(layer, name)
            for index in product(*map(range, parameter.shape)):
                kept = parameter.data[index].clone()
                parameter.data[index] = kept + 1e-2
                up = float(omega(layers).detach())
                parameter.data[index] = kept - 1e-2
                down = float(omega(layers).detach())
                parameter.data[index] = kept
                assert float(parameter.grad[index]) == pytest.approx(0.3 * (up - down) / 2e-2, abs=2e-5), (name, index)
        assert float(layer.phi.grad[0]) == 0.0
        assert layer.a.grad is None and layer.c.grad is None


def test_the_penalty_falls_with_every_logit(stack: Any) -> None:
    _, layers = with_logits(stack, n=1)
    table, layer = UnitTable(layers), layers["0"]
    regularizer = GateKl()
    for parameter in (layer.phi, layer.bit_logits):
        for index in product(*map(range, parameter.shape)):
            before = regularizer.value(table)
            parameter.data[index] -= 0.5
            first = parameter is layer.phi and index == (0,)
            assert regularizer.value(table) == before if first else regularizer.value(table) < before


def test_a_dropped_component_weighs_nothing_while_its_row_still_waits(stack: Any) -> None:
    _, layers = with_logits(stack, n=1, rank=5)
    table = UnitTable(layers)
    table.keep(torch.tensor([True, True, True, False, False]), final=True)
    waiting, expected = GateKl().value(table), float(expected_rank(table))
    table.compact()
    assert GateKl().value(table) == pytest.approx(waiting, rel=1e-6)
    assert float(expected_rank(table)) == pytest.approx(expected, rel=1e-6)


def test_nothing_is_added_after_the_final_choice() -> None:
    window = OneShot(end=0.5).window(100)
    assert [GateKl().active(t, window) for t in (1, 50, 51)] == [True, True, False]


def test_dual_ascent_raises_the_weight_above_the_target_and_lowers_it_below(stack: Any) -> None:
    _, layers = with_logits(stack)
    table = UnitTable(layers)
    p = [torch.sigmoid(layer.phi.detach() + 1.5986) for layer in layers.values()]
    rank = sum(1 + float(q[1:].cumprod(0).sum()) for q in p) / 3
    assert float(expected_rank(table)) == pytest.approx(rank, rel=1e-5)
    for target in (rank - 1, rank + 0.01, rank + 1e6):
        regularizer = GateKl(weight=0.02, target_rank=target, dual_rate=0.01)
        regularizer.attach(table)
        regularizer.after_backward(table)
        assert float(regularizer.current) == pytest.approx(max(0.0, 0.02 + 0.01 * (rank - target)), abs=1e-6)
    fixed = GateKl(weight=0.02)
    fixed.attach(table)
    fixed.after_backward(table)
    assert float(fixed.current) == pytest.approx(0.02)


def test_dual_ascent_reaches_its_rank(stack: Any) -> None:
    """A task that wants every gate open, ½(1 − P)² each, against a λ that grows until the rank is that asked for."""
    _, layers = stack(n=2, rank=6, part=Gated(), shake=False)
    table, regularizer = UnitTable(layers), GateKl(weight=0.0, target_rank=3.0, dual_rate=3e-3)
    regularizer.attach(table)
    optimizer = torch.optim.SGD([layer.phi for layer in layers.values()], lr=2.0)
    for layer in layers.values():
        layer.phi.data.zero_()
    for _ in range(500):
        for layer in layers.values():
            p = open_probability(layer.phi.detach())
            layer.phi.grad = -(1 - p) * p * (1 - p)
            layer.bit_logits.grad = None
        regularizer.after_backward(table)
        optimizer.step()
    assert float(expected_rank(table)) == pytest.approx(3.0, abs=0.05)
    assert float(regularizer.current) > 0.01


def test_the_weight_survives_a_checkpoint(stack: Any) -> None:
    _, layers = with_logits(stack)
    table = UnitTable(layers)
    first, second = (GateKl(target_rank=2.0, dual_rate=0.1) for _ in range(2))
    for regularizer in (first, second):
        regularizer.attach(table)
    first.after_backward(table)
    assert float(first.current) != float(second.current)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.current, second.current)
    first.after_backward(table)
    assert not torch.equal(first.current, second.current)  # a copy, not the same tensor


def test_a_dual_rate_without_a_target_is_refused() -> None:
    with pytest.raises(UserError, match=r"regularizer\.dual_rate=0\.1"):
        GateKl(dual_rate=0.1)


def test_the_penalty_of_a_module_is_its_own(stack: Any) -> None:
    _, layers = with_logits(stack)
    table = UnitTable(layers)
    (group,) = table.groups()
    each = penalty(group, group.stack("phi"), group.stack("bit_logits"))
    alone = [float(omega({name: layer}).detach()) for name, layer in layers.items()]
    assert each.tolist() == pytest.approx(alone, rel=1e-5)
