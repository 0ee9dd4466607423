"""IncreLoRA's score: that of an explicit update, smoothed, of the whole step, and of nothing that is not a step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_cli.adapters.components import Components
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.mora_components import MoraComponents
from dora_cli.adapters.svd import Svd
from dora_cli.allocation.importance.module_sensitivity import ModuleSensitivity
from dora_cli.allocation.table import UnitTable

PARTS = [Components, Svd, Lora, MoraComponents]


def expected(model: nn.Module, layers: Any, batches: list[Tensor]) -> list[float]:
    """I of every module through an explicit ΔW: the same network with W₀ + ΔW in place of each layer, in float64."""
    delta = [layer.delta_weight().double().requires_grad_() for layer in layers.values()]
    total = torch.zeros((), dtype=torch.float64)
    for x in batches:
        y = x.double()
        for layer, d in zip(layers.values(), delta, strict=True):
            y = nn.functional.linear(y, layer.weight.double() + d, layer.bias.double()).tanh()
        total = total + (y - 1).square().sum()
    gradients = torch.autograd.grad(total, delta)
    return [float((d.detach() * g).abs().sum()) / d.numel() ** 0.5 for d, g in zip(delta, gradients, strict=True)]


@pytest.mark.parametrize("part", PARTS)
def test_a_modules_sensitivity_is_that_of_an_explicit_update(stack: Any, part: Any) -> None:
    """β = 0 leaves I itself in the mean, here of three micro-batches of different shapes."""
    model, layers = stack(n=3, width=8, rank=3, part=part())
    table, importance = UnitTable(layers), ModuleSensitivity(beta=0.0)
    importance.attach(table)
    batches = [torch.randn(5, 8), torch.randn(2, 3, 8), torch.randn(1, 8)]
    for x in batches:
        (model(x) - 1).square().sum().backward()
    should = expected(model, layers, batches)
    apart = [sum(i) for i in zip(*(expected(model, layers, [x]) for x in batches), strict=True)]
    with torch.no_grad():  # as in the loop, the optimizer steps before the importance looks
        for layer in layers.values():
            layer.a.add_(1.0)
            layer.b.add_(1.0)
    assert set(importance.gradients) == {0, 1, 2}
    importance.update(table, 1)
    assert importance.mean.tolist() == pytest.approx(should, rel=1e-4)
    assert min(a - s for a, s in zip(apart, should, strict=True)) > 1e-3  # the sum comes before the absolute value
    assert not importance.gradients and not importance.updates  # nothing is held between steps


def test_sensitivities_are_smoothed_as_adaloras_and_shared_by_a_modules_components(stack: Any) -> None:
    model, layers = stack(n=2, width=8, rank=2, part=Svd())
    table, importance = UnitTable(layers), ModuleSensitivity(beta=0.85, beta_uncertainty=0.7)
    importance.attach(table)
    mean, spread = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(1, 5):
        x = torch.randn(6, 8)
        (model(x) - 1).square().sum().backward()
        now = torch.tensor(expected(model, layers, [x]), dtype=torch.float64)
        mean = 0.85 * mean + 0.15 * now
        spread = 0.7 * spread + 0.3 * (now - mean).abs()
        importance.update(table, step)
    scores = importance.scores(table, None)
    assert torch.allclose(scores.double(), (mean * spread)[table.module], rtol=1e-4)
    table.grow(0, 2)
    assert torch.equal(importance.scores(table, None)[4:], scores[[0, 0]])  # newcomers have their module's score


def test_evaluation_and_steps_after_the_final_choice_are_not_looked_at(stack: Any) -> None:
    model, layers = stack(n=2, width=8, rank=2, part=Svd())
    table, importance = UnitTable(layers), ModuleSensitivity()
    importance.attach(table)
    model.eval()
    model(torch.randn(3, 8)).sum().backward()
    model.train()
    with torch.no_grad():
        model(torch.randn(3, 8))
    assert not importance.gradients
    model(torch.randn(3, 8)).sum().backward()
    assert importance.gradients
    importance.update(table, 1)
    model(torch.randn(3, 8)).sum().backward()
    importance.close_period(table)  # an event that no update came before
    table.settle()
    model(torch.randn(3, 8)).sum().backward()
    assert not importance.gradients and not importance.updates


def test_recomputed_activations_count_once(stack: Any) -> None:
    model, layers = stack(n=3, width=8, rank=2, part=Svd())
    table, importance = UnitTable(layers), ModuleSensitivity()
    importance.attach(table)
    x = torch.randn(4, 8)
    model(x).square().sum().backward()
    plain = {m: g.clone() for m, g in importance.gradients.items()}
    importance.gradients.clear()
    importance.updates.clear()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(importance.gradients[m], g) for m, g in plain.items())


def test_a_compiled_model_is_watched_too(stack: Any) -> None:
    model, layers = stack(n=2, width=8, rank=2, part=Svd())
    table, importance = UnitTable(layers), ModuleSensitivity()
    importance.attach(table)
    x = torch.randn(4, 8)
    model(x).square().sum().backward()
    plain = {m: g.clone() for m, g in importance.gradients.items()}
    importance.gradients.clear()
    importance.updates.clear()
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    assert set(importance.gradients) == set(plain)
    assert all(torch.allclose(importance.gradients[m], g, atol=1e-6) for m, g in plain.items())
