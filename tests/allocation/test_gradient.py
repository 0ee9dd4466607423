"""The first-order proxy of ablation is the derivative by a factor before each component, with the sign of its worth."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dora_cli.adapters.components import Components
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.mora_components import MoraComponents
from dora_cli.adapters.svd import Svd
from dora_cli.allocation.importance.ablation import Ablation
from dora_cli.allocation.importance.gradient import Gradient
from dora_cli.allocation.table import UnitTable

PARTS = [Lora, Components, Svd, MoraComponents]


def probed(stack: Any, part: Any) -> tuple[Any, UnitTable, Any, Any]:
    """A float64 regression; ``loss`` has a graph, ``probe`` takes a mask, whose entries may be fractions."""
    model, layers = stack(n=3, width=8, rank=3, part=part)
    model.double()
    table = UnitTable(layers)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 8, generator=g).double(), torch.randn(20, 8, generator=g).double()

    def loss() -> Tensor:
        return (model(x) - y).square().mean()

    def probe(mask: Tensor) -> float:
        with table.only(mask), torch.no_grad():
            return float(loss())

    return layers, table, loss, probe


def scored(table: UnitTable, loss: Any, **options: Any) -> Tensor:
    importance = Gradient(**options)
    importance.attach(table)
    loss().backward()
    importance.update(table, 1)
    return importance.scores(table, None)


@pytest.mark.parametrize("part", PARTS)
def test_the_score_is_minus_the_slope_by_a_factor_before_each_component(stack: Any, part: Any) -> None:
    _, table, loss, probe = probed(stack, part())
    scores = scored(table, loss, beta=0.0)
    whole, h = torch.ones(9, dtype=torch.float64), 1e-5
    for unit in range(9):
        step = torch.zeros_like(whole)
        step[unit] = h
        slope = (probe(whole + step) - probe(whole - step)) / (2 * h)
        assert float(scores[unit]) == pytest.approx(-slope, rel=1e-4, abs=1e-9)
    assert bool((scores > 0).any()) and bool((scores < 0).any())  # some help, some hurt


@pytest.mark.parametrize("part", [Lora, Components, Svd])
def test_for_small_components_it_is_the_ablation_score(stack: Any, part: Any) -> None:
    layers, table, loss, probe = probed(stack, part())
    with torch.no_grad():
        for layer in layers.values():
            getattr(layer, layer.valve).mul_(1e-3)
    scores = scored(table, loss, beta=0.0)
    ablated = Ablation(only_term=False).scores(table, probe)
    # float32 holds both scores; what separates them is of second order, a thousandth of the first
    assert torch.allclose(scores, ablated, rtol=2e-2, atol=2e-6)
    assert torch.equal(scores.argsort()[[0, -1]], ablated.argsort()[[0, -1]])


def test_slopes_are_smoothed_with_their_sign_and_newcomers_start_at_zero(stack: Any) -> None:
    _, table, loss, _ = probed(stack, Lora())
    importance = Gradient(beta=0.9)
    importance.attach(table)
    once = scored(table, loss, beta=0.0)
    importance.update(table, 1)
    assert torch.allclose(importance.scores(table, None), 0.1 * once)
    for layer in table.layers:
        layer.b.grad.mul_(-3.0)  # type: ignore[union-attr]
    importance.update(table, 2)
    assert torch.allclose(importance.scores(table, None), 0.09 * once - 0.3 * once)
    table.grow(0, 2)
    assert importance.scores(table, None)[9:].tolist() == [0.0, 0.0]


def test_a_component_without_effect_is_worth_nothing(stack: Any) -> None:
    layers, table, loss, _ = probed(stack, Lora())
    with torch.no_grad():
        layers["2"].b[:, 1] = 0.0
    assert float(scored(table, loss)[4]) == 0.0
