"""LoRA's and rsLoRA's scales (METHODS 1, properties 1, 2, 4 and 5; the start and the rank are in test_layers.py)."""

import pytest
import torch
from torch import Tensor, nn

from dora_cli.adapters.components import Components
from dora_cli.adapters.lora import Lora, LoraLayer


def filled(part: Lora, base: nn.Module, rank: int, b: Tensor, a: Tensor) -> LoraLayer:
    layer = part.layer(base, rank)
    with torch.no_grad():
        layer.a.copy_(a)
        layer.b.copy_(b)
    return layer


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilised"])
def test_doubling_alpha_and_halving_b_changes_nothing(scaling: str) -> None:
    base, a, b = nn.Linear(9, 7), torch.randn(4, 9), torch.randn(7, 4)
    once = filled(Lora(alpha=8.0, scaling=scaling), base, 4, b, a)
    twice = filled(Lora(alpha=16.0, scaling=scaling), base, 4, b / 2, a)
    x = torch.randn(5, 9)
    assert torch.equal(once(x), twice(x))
    assert not torch.allclose(once(x), base(x), atol=1e-2)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rslora_with_alpha_over_root_rank_is_lora_with_alpha(rank: int) -> None:
    base, a, b = nn.Linear(9, 7), torch.randn(rank, 9), torch.randn(7, rank)
    lora = filled(Lora(alpha=5.0), base, rank, b, a)
    stabilised = filled(Lora(alpha=5.0 / rank**0.5, scaling="rank_stabilised"), base, rank, b, a)
    x = torch.randn(5, 9)
    assert torch.allclose(lora(x), stabilised(x), atol=1e-5)
    assert stabilised.scale == pytest.approx(5.0 / rank)


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilised"])
def test_merged_is_unmerged_and_dropout_is_irrelevant_at_the_start(scaling: str) -> None:
    base = nn.Linear(9, 7)
    x = torch.randn(5, 9)
    fresh = Lora(alpha=8.0, scaling=scaling, dropout=0.5).layer(base, 4)
    assert torch.equal(fresh.train()(x), base(x))
    layer = filled(Lora(alpha=8.0, scaling=scaling), base, 4, torch.randn(7, 4), torch.randn(4, 9))
    expected = layer(x)
    with torch.no_grad():
        base.weight += layer.delta_weight()
    assert torch.allclose(base(x), expected, atol=1e-5)


def test_its_start_on_components_with_gates_gives_b_the_gradient_that_it_has_in_lora() -> None:
    base, x, part = nn.Linear(9, 7).requires_grad_(False), torch.randn(5, 9), Components(init="lora")
    gated = part.layer(base, 4)
    part.start().fill("m", gated)  # type: ignore[union-attr]
    a = gated.a.detach()
    assert torch.equal(gated(x), base(x)) and gated.c.eq(1).all() and gated.b.eq(0).all()
    assert 0.5 * 9**-0.5 < float(a.abs().max()) <= 9**-0.5
    plain = filled(Lora(), base, 4, torch.zeros(7, 4), a)
    for layer in (gated, plain):
        layer(x).square().sum().backward()
    assert torch.allclose(gated.b.grad, plain.b.grad, atol=1e-6) and gated.b.grad.abs().min() > 0
