"""DEM and orthogonality: hand-checked values, and closed-form gradients against autograd of the definition."""

from typing import Any

import pytest
import torch

from dora_cli.adapters.svd import Svd
from dora_cli.allocation.regularizers.dem import Dem
from dora_cli.allocation.regularizers.orthogonal import Orthogonal
from dora_cli.allocation.schedules import CubicLate
from dora_cli.allocation.table import UnitTable


def gradients(regularizer: Any, layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    table = UnitTable(layers)
    regularizer.attach(table)
    for layer in layers.values():
        for parameter in layer.adapter_parameters().values():
            parameter.grad = torch.zeros_like(parameter)
    regularizer.after_backward(table)
    return {f"{n}.{k}": p.grad for n, la in layers.items() for k, p in la.adapter_parameters().items()}


@pytest.mark.parametrize("normaliser", ["code", "paper"])
def test_dem_gradient_and_value_are_those_of_the_definition(stack: Any, normaliser: str) -> None:
    _, layers = stack(n=3, rank=4)
    regularizer = Dem(weight=0.7, normaliser=normaliser)
    ours = gradients(regularizer, layers)
    n = 3 * 4 * (2 if normaliser == "code" else 1)
    value = sum(la.a[i].var() + la.b[:, i].var() for la in layers.values() for i in range(4)) / n
    parameters = {f"{n}.{k}": p for n, la in layers.items() for k, p in la.adapter_parameters().items() if k != "c"}
    expected = torch.autograd.grad(0.7 * value, list(parameters.values()))
    assert regularizer.value(UnitTable(layers)) == pytest.approx(float(value), rel=1e-5)
    for name, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(ours[name], gradient, atol=1e-7)
    assert not any(bool(ours[f"{n}.c"].any()) for n in layers)


def test_dem_of_the_row_one_two_three(stack: Any) -> None:
    _, layers = stack(n=1, width=3, rank=1, shake=False)
    layer = layers["0"]
    with torch.no_grad():
        layer.a.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        layer.b.fill_(4.0)  # constant: no variance, no force
    grads = gradients(Dem(weight=1.0, normaliser="paper"), layers)
    assert grads["0.a"].tolist() == [[pytest.approx(-1.0), pytest.approx(0.0), pytest.approx(1.0)]]
    assert not bool(grads["0.b"].any())
    assert Dem(weight=1.0).units == {"components"}


def test_dem_acts_up_to_the_final_choice_or_always() -> None:
    window = CubicLate(start=0.1, end=0.5).window(100)
    assert [Dem().active(t, window) for t in (1, 50, 51)] == [True, True, False]
    assert Dem(until="always").active(100, window)


def test_decoupled_dem_moves_by_rate_times_weight_times_gradient(stack: Any) -> None:
    _, layers = stack(n=2, rank=3)
    reference = gradients(Dem(weight=0.5), layers)
    before = {n: la.a.detach().clone() for n, la in layers.items()}
    regularizer = Dem(weight=0.5, mode="decoupled")
    assert not any(bool(g.any()) for g in gradients(regularizer, layers).values())
    regularizer.after_step(UnitTable(layers), learning_rate=0.2)
    for name, layer in layers.items():
        assert torch.allclose(layer.a, before[name] - 0.2 * reference[f"{name}.a"], atol=1e-7)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("rank", [3, 16], ids=["tall", "square"])
def test_orthogonal_gradient_and_value_are_those_of_the_definition(stack: Any, squared: bool, rank: int) -> None:
    _, layers = stack(n=2, width=16, rank=rank, part=Svd())
    regularizer = Orthogonal(weight=0.3, squared=squared)
    ours = gradients(regularizer, layers)
    norms = []
    for layer in layers.values():
        for matrix in (layer.b.T @ layer.b, layer.a @ layer.a.T):
            norms.append((matrix - torch.eye(rank)).norm())
    value = sum(n**2 for n in norms) if squared else sum(norms) / len(norms)
    parameters = {f"{n}.{k}": p for n, la in layers.items() for k, p in la.adapter_parameters().items() if k != "c"}
    expected = torch.autograd.grad(0.3 * value, list(parameters.values()))
    assert regularizer.value(UnitTable(layers)) == pytest.approx(float(value), rel=1e-5)
    for name, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(ours[name], gradient, atol=1e-5)


def test_orthonormal_factors_are_not_penalised(stack: Any) -> None:
    _, layers = stack(n=1, width=16, rank=4, part=Svd())
    with torch.no_grad():
        layers["0"].b.copy_(torch.linalg.qr(torch.randn(16, 4))[0])
        layers["0"].a.copy_(torch.linalg.qr(torch.randn(16, 4))[0].T)
    assert Orthogonal().value(UnitTable(layers)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [16, 384, 1536])
def test_rounding_at_orthonormal_is_no_direction(stack: Any, width: int, dtype: torch.dtype) -> None:
    """The norm's kink: a gap of 1e-7 would give as large a gradient as one of 1, and one that is noise."""
    torch.manual_seed(0)
    _, layers = stack(n=2, width=width, rank=8, part=Svd())
    with torch.no_grad():
        for layer in layers.values():
            layer.to(dtype)
            layer.b.copy_(torch.linalg.qr(torch.randn(width, 8, dtype=dtype))[0])
            layer.a.copy_(torch.linalg.qr(torch.randn(width, 8, dtype=dtype))[0].T)
    assert not any(bool(g.any()) for g in gradients(Orthogonal(), layers).values())
    with torch.no_grad():
        layers["0"].b[:, 0] *= 1.0001  # a gap of 2e-4 is one
    found = gradients(Orthogonal(weight=1.0), layers)
    assert found["0.b"][:, 0].norm() == pytest.approx(2 / 4, rel=1e-2)  # 2 P Ĝ over 4 matrices, along column 0
    assert not any(bool(gradient.any()) for name, gradient in found.items() if name != "0.b")
    with torch.no_grad():
        layers["0"].b[0, 0] = torch.nan
    assert gradients(Orthogonal(), layers)["0.b"].isnan().any()  # is said, and not taken for rounding
