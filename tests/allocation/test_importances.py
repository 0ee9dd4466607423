"""Sensitivity's hand-checked fixture, ablation's properties, freezing scores and counts, the random control."""

from typing import Any

import pytest
import torch

from dora_cli.adapters.aflora import Aflora
from dora_cli.adapters.components import Components
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.svd import Svd
from dora_cli.allocation.allocators.freeze import Freeze
from dora_cli.allocation.allocators.prune_and_reallocate import PruneAndReallocate
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.ablation import Ablation
from dora_cli.allocation.importance.freezing_score import FreezingScore
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.importance.sensitivity import Sensitivity
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import Constant, CubicEarly
from dora_cli.allocation.table import UnitTable


def test_sensitivity_of_one_weight_is_the_hand_checked_fixture(stack: Any) -> None:
    """w = 2 with gradients 0.5, then 0.1 (METHODS 0.8): σ = 0.019125, then 0.018073."""
    _, layers = stack(n=1, width=4, rank=1, part=Svd(), shake=False)
    layer = layers["0"]
    table, importance = UnitTable(layers), Sensitivity(beta=0.85, beta_uncertainty=0.85)
    importance.attach(table)
    with torch.no_grad():
        layer.c.fill_(2.0)
    for step, (gradient, sigma) in enumerate(((0.5, 0.019125), (0.1, 0.018073)), start=1):
        layer.a.grad, layer.b.grad = torch.zeros_like(layer.a), torch.zeros_like(layer.b)
        layer.c.grad = torch.tensor([gradient])
        importance.update(table, step)
        assert float(importance.scores(table, None)) == pytest.approx(sigma, abs=1e-6)


def test_sensitivity_adds_the_gate_and_the_means_over_row_and_column(stack: Any) -> None:
    _, layers = stack(n=2, width=6, rank=3, part=Svd())
    table, importance = UnitTable(layers), Sensitivity()
    importance.attach(table)
    g = torch.Generator().manual_seed(0)
    mean: dict[str, torch.Tensor] = {}
    spread: dict[str, torch.Tensor] = {}
    for step in range(1, 4):
        for name, layer in layers.items():
            for key, p in layer.adapter_parameters().items():
                p.grad = torch.randn(p.shape, generator=g)
                if (step, name) == (2, "1"):  # took no part in this step: what is known of it stays
                    p.grad = None
                    continue
                now = (p.detach() * p.grad).abs()
                k = f"{name}.{key}"
                mean[k] = 0.85 * mean.get(k, torch.zeros_like(now)) + 0.15 * now
                spread[k] = 0.85 * spread.get(k, torch.zeros_like(now)) + 0.15 * (now - mean[k]).abs()
        importance.update(table, step)
    expected = []
    for name in layers:
        sigma = {key: mean[f"{name}.{key}"] * spread[f"{name}.{key}"] for key in "abc"}
        expected.append(sigma["c"] + sigma["b"].mean(0) + sigma["a"].mean(1))
    assert torch.allclose(importance.scores(table, None), torch.cat(expected), rtol=1e-4)


def test_sensitivity_follows_its_units_through_compaction(stack: Any) -> None:
    _, layers = stack(n=2, width=6, rank=4, part=Svd())
    table, importance = UnitTable(layers), Sensitivity()
    importance.attach(table)
    for layer in layers.values():
        for p in layer.adapter_parameters().values():
            p.grad = torch.randn_like(p)
    importance.update(table, 1)
    before = importance.scores(table, None)
    keep = torch.tensor([True, False, True, True, False, False, True, False])
    table.keep(keep, final=True)
    table.compact()
    after = importance.scores(table, None)
    assert torch.allclose(after[keep], before[keep], rtol=1e-5)  # means are summed in another order
    assert not bool(after[~keep].any())

    other = Sensitivity()
    other.attach(table)
    other.scores(table, None)
    state = {k: v.clone() for k, v in importance.state_dict().items()}
    other.load_state_dict(state)
    for layer in layers.values():
        for p in layer.adapter_parameters().values():
            p.grad = torch.randn_like(p)
    importance.update(table, 2)
    other.update(table, 2)
    assert torch.equal(other.scores(table, None), importance.scores(table, None))
    now = importance.state_dict()
    for m, layer in enumerate(layers.values()):
        for name, p in layer.adapter_parameters().items():
            mean, spread, seen = state[f"mean.{m}.{name}"], state[f"spread.{m}.{name}"], (p * p.grad).detach().abs()
            mean = 0.85 * mean + 0.15 * seen
            assert torch.allclose(now[f"mean.{m}.{name}"], mean, rtol=1e-4, atol=1e-8)
            spread = 0.85 * spread + 0.15 * (seen - mean).abs()
            assert torch.allclose(now[f"spread.{m}.{name}"], spread, rtol=1e-4, atol=1e-8)


def _probed(stack: Any, part: Any) -> tuple[dict[str, Any], UnitTable, Any]:
    model, layers = stack(n=3, width=8, rank=3, part=part)
    table = UnitTable(layers)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 8, generator=g), torch.randn(20, 8, generator=g)

    def probe(mask: torch.Tensor) -> float:
        with table.only(mask), torch.no_grad():
            return float((model(x) - y).square().mean())

    return layers, table, probe


def test_ablation_is_its_definition_and_leaves_no_trace(stack: Any) -> None:
    layers, table, probe = _probed(stack, Lora())
    with torch.no_grad():
        layers["2"].b[:, 1] = 0.0  # a rank that does nothing yet
    before = {n: {k: p.detach().clone() for k, p in la.adapter_parameters().items()} for n, la in layers.items()}
    rng = torch.get_rng_state()
    scores = Ablation().scores(table, probe)
    whole = torch.ones(9, dtype=torch.bool)
    for unit in range(9):
        without, only = whole.clone(), torch.zeros(9, dtype=torch.bool)
        without[unit], only[unit] = False, True
        assert float(scores[unit]) == pytest.approx(-probe(whole) + probe(without) - probe(only), abs=1e-6)
    assert float(Ablation(only_term=False).scores(table, probe)[4]) == pytest.approx(0.0, abs=1e-7)
    assert torch.equal(rng, torch.get_rng_state())
    for name, layer in layers.items():
        for key, parameter in layer.adapter_parameters().items():
            assert torch.equal(parameter, before[name][key])


def test_alora_moves_ranks_at_a_fixed_total_and_keeps_the_function_when_it_adds(stack: Any) -> None:
    model, layers = stack(n=4, width=16, rank=4, part=Lora())
    allocation = Allocation(
        layers,
        schedule=Constant(start=1, end=40),
        importance=Random(),
        allocator=PruneAndReallocate(interval=5, n=3, rounds=6),
        regularizer=NoRegularizer(),
        total_steps=40,
        target=Target(16, by_cost=False),
    )
    assert allocation.window.end == 26  # the sixth round, not the schedule's end
    optimizer = torch.optim.AdamW([p for la in layers.values() for p in la.adapter_parameters().values()], lr=1e-3)
    x = torch.randn(5, 16)
    for step in range(1, 41):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        event = allocation.after_step(step, optimizer)
        if event:
            assert event["alive"] == 16 == sum(event["ranks"].values())
    assert len(set(allocation.table.ranks().values())) > 1


def test_freezing_is_exact_permanent_and_complete(stack: Any) -> None:
    model, layers = stack(n=4, width=12, rank=2, part=Aflora(freeze_square=False))
    allocation = Allocation(
        layers,
        schedule=CubicEarly(start=10, end=40),
        importance=FreezingScore(window=5),
        allocator=Freeze(interval=5),
        regularizer=NoRegularizer(),
        total_steps=50,
    )
    optimizer = torch.optim.AdamW([p for la in layers.values() for p in la.adapter_parameters().values()], lr=1e-2)
    x, y = torch.randn(16, 12), torch.randn(16, 12)
    frozen: dict[int, torch.Tensor] = {}
    for step in range(1, 51):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        event = allocation.after_step(step, optimizer)
        optimizer.zero_grad()
        table = allocation.table
        if event:
            x_of = min(max((step - 10) / 30, 0), 1)
            assert event["alive"] == round(8 * (1 - x_of) ** 3) == int((~table.frozen).sum())
        for unit, values in frozen.items():
            tensor = table.layers[int(table.module[unit])].unit_tensors()[int(table.order[unit])]
            assert torch.equal(tensor, values), "a frozen tensor has moved"
        for unit in torch.nonzero(table.frozen).flatten().tolist():
            tensor = table.layers[int(table.module[unit])].unit_tensors()[int(table.order[unit])]
            frozen.setdefault(unit, tensor.detach().clone())
    assert len(frozen) == 8
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == 8  # s_d and s_b of four layers: the frozen ones have left the optimizer


def test_random_scores_depend_on_the_seed_alone(stack: Any) -> None:
    def drawn(seed: int) -> torch.Tensor:
        _, layers = stack(n=2, rank=3, part=Components())
        torch.manual_seed(seed)
        table, importance = UnitTable(layers), Random()
        importance.attach(table)
        return importance.scores(table, None)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
