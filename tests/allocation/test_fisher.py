"""Fisher scores: squares of the slopes by a factor before each component, which stand for the curvature."""

from typing import Any

import pytest
import torch

from dora_cli.adapters.components import Components
from dora_cli.adapters.lora import Lora
from dora_cli.allocation.importance.fisher import Fisher
from dora_cli.allocation.importance.gradient import Gradient
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import Verdict


@pytest.mark.parametrize("part", [Lora, Components])
def test_the_score_is_the_square_of_what_gradient_scores(stack: Any, part: Any) -> None:
    model, layers = stack(n=3, width=8, rank=3, part=part())
    table = UnitTable(layers)
    model(torch.randn(20, 8)).square().mean().backward()
    fisher, gradient = Fisher(beta=0.0), Gradient(beta=0.0)
    for importance in (fisher, gradient):
        importance.attach(table)
        importance.update(table, 1)
    assert torch.allclose(fisher.scores(table, None), gradient.scores(table, None).square())


def test_it_does_not_cancel_out_over_batches_and_leaves_out_steps_that_were_not_taken(stack: Any) -> None:
    model, layers = stack(n=2, width=8, rank=3, part=Lora())
    table, fisher = UnitTable(layers), Fisher(beta=0.5)
    fisher.attach(table)
    loss = model(torch.randn(20, 8)).square().mean()
    loss.backward()
    fisher.update(table, 1)
    once = fisher.scores(table, None).clone()
    for layer in layers.values():
        layer.b.grad.neg_()
    fisher.update(table, 2)
    assert torch.allclose(fisher.scores(table, None), 1.5 * once)  # 0.5 x, then 0.5 · 0.5 x + 0.5 x
    for layer in layers.values():
        layer.b.grad.fill_(torch.nan)
    fisher.update(table, 3, Verdict.of(torch.tensor(torch.nan)))
    assert torch.allclose(fisher.scores(table, None), 1.5 * once)


def test_of_a_model_that_is_right_it_is_the_curvature(stack: Any) -> None:
    """With y = f(x) + noise of variance 1 and L = ½ (f(x) − y)², E (∂L/∂g)² is E ∂²L/∂g² (the information equality)."""
    model, layers = stack(n=1, width=6, rank=2, part=Lora())
    table = UnitTable(layers)
    n = 3000
    x, noise = torch.randn(n, 6), torch.randn(n, 6)
    with torch.no_grad():
        y = model(x) + noise
        slopes = []
        for unit in range(2):
            outputs = []
            for sign in (1, -1):
                mask = torch.ones(2)
                mask[unit] += sign * 1e-3
                with table.only(mask):
                    outputs.append(model(x))
            slopes.append((outputs[0] - outputs[1]) / 2e-3)
        curvature = torch.stack([slope.square().sum(1).mean() for slope in slopes])
    fisher = Fisher(beta=0.0)
    fisher.attach(table)
    total = torch.zeros(len(table))
    for i in range(n):
        model.zero_grad()
        (0.5 * (model(x[i : i + 1]) - y[i : i + 1]).square().sum()).backward()
        fisher.update(table, i + 1)
        total += fisher.scores(table, None)
    assert torch.allclose(total / n, curvature, rtol=0.15)
