"""adapter.init=orthogonal: orthonormal directions, the identity, and a gradient of λ that nothing scales down."""

import pytest
import torch
from torch import nn

from dora_cli.adapters.components import Components
from dora_cli.adapters.init.orthogonal import OrthogonalStart
from dora_cli.adapters.part import LowRankPart
from dora_cli.adapters.svd import Svd


@pytest.mark.parametrize("part", [Svd(alpha=12.0), Components(alpha=12.0)], ids=["svd", "components"])
def test_lambda_has_the_gradient_of_a_singular_value(part: LowRankPart) -> None:
    base = nn.Linear(7, 9).double()
    layer = part.layer(base, 4).double()
    torch.manual_seed(3)
    OrthogonalStart().fill("any", layer)
    p, q = layer.b.detach(), layer.a.detach()
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(p.T @ p, eye, atol=1e-6)  # drawn in float32
    assert torch.allclose(q @ q.T, eye, atol=1e-6)
    x, up = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, base(x))
    (y * up).sum().backward()
    expected = torch.stack([12.0 / 4 * p[:, i] @ (up.T @ x) @ q[i] for i in range(4)])  # of pᵀ G q, G = ∂L/∂ΔW
    assert layer.c.grad is not None
    assert torch.allclose(layer.c.grad, expected, rtol=1e-5)  # AdaLoRA's scale is α / (r + 1e-5)


def test_more_components_than_a_side_has_are_as_orthogonal_as_can_be() -> None:
    layer = Svd().layer(nn.Linear(3, 8), 5)
    OrthogonalStart().fill("any", layer)
    assert torch.allclose(layer.a.T @ layer.a, torch.eye(3), atol=1e-6)
    assert torch.allclose(layer.b.T @ layer.b, torch.eye(5), atol=1e-6)


def test_a_seed_draws_the_same_start() -> None:
    layers = [Svd().layer(nn.Linear(6, 5), 2) for _ in range(2)]
    for layer in layers:
        torch.manual_seed(11)
        OrthogonalStart().fill("any", layer)
    assert torch.equal(layers[0].a, layers[1].a)
    assert torch.equal(layers[0].b, layers[1].b)
