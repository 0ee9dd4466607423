"""Magnitude and direction: METHODS 4's properties, its formula for the norms, and norms that follow every verb."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_cli.adapters.base import dense_weight
from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.adapters.weight_decomposed import WeightDecomposed, WeightDecomposedLayer
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError

BASES = [nn.Linear(10, 6), Conv1D(6, 10)]
IDS = ["linear", "conv1d"]
both_layouts = pytest.mark.parametrize("base", BASES, ids=IDS)


def dense(layer: WeightDecomposedLayer) -> Tensor:
    """W₀ + sBA as it stands, the probe's mask included."""
    weight = layer.base_layer.weight.detach()
    gates = layer.scale if layer.probe_mask is None else layer.scale * layer.probe_mask
    return (weight.T if layer.transposed else weight) + (layer.b * gates) @ layer.a


def rescaled(layer: WeightDecomposedLayer) -> Tensor:
    """W' by its definition."""
    direction = dense(layer)
    return (layer.magnitude / direction.norm(dim=1))[:, None] * direction


def shaken(base: nn.Module, rank: int = 4, double: bool = False, **options: Any) -> WeightDecomposedLayer:
    g = torch.Generator().manual_seed(3)
    layer = WeightDecomposed(**options).layer(base, rank)
    if double:
        layer.double()
        layer.squares = dense_weight(base).square().sum(1)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=g).to(parameter) * 0.3)
    return layer


@both_layouts
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_at_the_start_is_the_base_models_bit_for_bit(base: nn.Module, dropout: float) -> None:
    layer = WeightDecomposed(dropout=dropout).layer(base, 4)
    x = torch.randn(5, 3, 10)
    for training in (True, False):
        assert torch.equal(layer.train(training)(x), base(x))


@both_layouts
def test_forward_is_the_rescaled_weight_and_an_unscaled_bias(base: nn.Module) -> None:
    layer = shaken(base, alpha=8.0)
    with torch.no_grad():
        base.bias.normal_()
    x = torch.randn(5, 3, 10)
    assert torch.allclose(layer(x), x @ rescaled(layer).T + base.bias, atol=1e-5)
    plain = (base.weight.T if layer.transposed else base.weight) + layer.delta_weight()
    assert torch.allclose(plain, rescaled(layer), atol=1e-6)


def test_no_bias_is_needed() -> None:
    layer = shaken(nn.Linear(10, 6, bias=False))
    x = torch.randn(5, 10)
    assert torch.allclose(layer(x), x @ rescaled(layer).T, atol=1e-5)


@both_layouts
def test_with_dropout_the_whole_change_sees_the_dropped_input(base: nn.Module) -> None:
    layer = shaken(base, dropout=0.5, alpha=8.0)
    x = torch.randn(7, 10)
    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5, training=True)
    change = rescaled(layer) - (base.weight.T if layer.transposed else base.weight)
    assert torch.allclose(out, base(x) + dropped @ change.T, atol=1e-5)
    assert not torch.allclose(out, layer.eval()(x), atol=1e-2)


def test_fixture_of_two_rows() -> None:
    """METHODS 0.8: W₀ = [[3, 4], [0, 2]], ΔW = [[0, 8], [0, 0]], m = (5, 2)."""
    base = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    layer = WeightDecomposed().layer(base, 1)
    assert torch.allclose(layer.magnitude, torch.tensor([5.0, 2.0]))
    with torch.no_grad():
        layer.a.copy_(torch.tensor([[0.0, 2.0]]))
        layer.b.copy_(torch.tensor([[4.0], [0.0]]))
    expected = torch.tensor([[1.21268, 4.85071], [0.0, 2.0]])
    assert torch.allclose(base.weight + layer.delta_weight(), expected, atol=1e-5)
    assert torch.allclose(layer(torch.eye(2)).T, expected, atol=1e-5)


@both_layouts
def test_norms_of_the_closed_form_are_those_of_the_sum(base: nn.Module) -> None:
    layer = shaken(base, alpha=8.0)
    assert torch.allclose(layer.norms(), dense(layer).norm(dim=1), rtol=1e-6)
    exact = shaken(nn.Linear(40, 30).double(), rank=7, double=True)
    assert torch.allclose(exact.norms(), dense(exact).norm(dim=1), rtol=1e-12)
    assert not layer.norms().requires_grad


def test_rows_of_the_merged_weight_have_the_magnitudes_as_norms() -> None:
    base = nn.Linear(10, 6)
    layer = shaken(base)
    assert torch.allclose((base.weight + layer.delta_weight()).norm(dim=1), layer.magnitude.abs(), rtol=1e-5)
    with torch.no_grad():
        base.weight[2] *= 2  # a base with row 2 twice as long, and the magnitude that it had
    doubled = WeightDecomposed().layer(base, 4)
    with torch.no_grad():
        for name, parameter in layer.adapter_parameters().items():
            doubled.get_parameter(name).copy_(parameter)
    assert torch.allclose((base.weight + doubled.delta_weight()).norm(dim=1), layer.magnitude.abs(), rtol=1e-5)


@both_layouts
def test_merged_is_unmerged(base: nn.Module) -> None:
    layer = shaken(base, alpha=8.0)
    x = torch.randn(20, 10)
    delta = layer.delta_weight()
    assert torch.allclose(layer(x), base(x) + x @ delta.T, atol=1e-5)


def test_no_gradient_flows_through_the_norms() -> None:
    """A finite difference, which moves n too, differs from autograd by Σ_k ∂L/∂(1/n_k) · ∂(1/n_k)/∂B and no more."""
    torch.manual_seed(0)
    layer = shaken(nn.Linear(5, 4).double(), rank=2, double=True, alpha=3.0)
    x, y = torch.randn(9, 5).double(), torch.randn(9, 4).double()

    def loss() -> Tensor:
        return (layer(x) - y).square().sum()

    loss().backward()
    assert layer.b.grad is not None
    assert layer.magnitude.grad is not None
    with torch.no_grad():
        direction, n = dense(layer), layer.norms()
        v, residual = x @ direction.T, 2 * (layer(x) - y)
        assert torch.allclose(layer.magnitude.grad, (residual * v).sum(0) / n, rtol=1e-10)
        # ∂n_k/∂b_kj = s · (w_k + ΔW_k)·a_j / n_k
        slope = layer.scale * (direction @ layer.a.T) / n[:, None]
        through_norm = -((residual * v).sum(0) * layer.magnitude / n**2)[:, None] * slope
        for k, j in ((0, 0), (2, 1), (3, 0)):
            values = []
            for sign in (1, -1):
                layer.b[k, j] += sign * 1e-6
                values.append(float(loss()))
                layer.b[k, j] -= sign * 1e-6
            difference = (values[0] - values[1]) / 2e-6
            assert difference - float(layer.b.grad[k, j]) == pytest.approx(float(through_norm[k, j]), rel=1e-5)
            assert abs(float(through_norm[k, j])) > 1e-3


def test_rows_of_zeros_stay_and_poison_nothing() -> None:
    base = nn.Linear(6, 4)
    with torch.no_grad():
        base.weight[1] = 0.0
    layer = WeightDecomposed().layer(base, 2)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    for parameter in layer.adapter_parameters().values():
        assert bool(torch.isfinite(parameter.grad).all())
    assert not bool(layer.delta_weight()[1].any())


def test_half_precision_bases_have_float32_norms_also_under_autocast() -> None:
    """300² · 10 overflows float16, and a norm in bfloat16 is off by up to 0.4 %."""
    base = nn.Linear(10, 6)
    with torch.no_grad():
        base.weight.mul_(300 / base.weight.abs())
    half = shaken(base.half())
    assert half.magnitude.dtype == torch.float32
    assert torch.allclose(half.norms(), dense(half).norm(dim=1), rtol=1e-5)
    layer = shaken(nn.Linear(10, 6).to(torch.bfloat16))
    expected = layer.norms()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.norms(), expected)
        assert layer(torch.randn(4, 10)).dtype == torch.bfloat16
    assert layer(torch.randn(4, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.dropout = 0.5
    assert layer(torch.randn(4, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_norms_follow_every_verb_at_once() -> None:
    model = nn.Sequential(nn.Linear(10, 6))
    model.requires_grad_(False)
    layers = inject(model, ["0"], WeightDecomposed(), [4])
    layer = layers["0"]
    assert isinstance(layer, WeightDecomposedLayer)
    with torch.no_grad():
        layer.b.normal_()
        layer.magnitude.mul_(1.5)
    table, x = UnitTable(layers), torch.randn(3, 10)

    def agrees() -> bool:
        expected = x @ rescaled(layer).T + layer.bias
        return torch.allclose(layer.norms(), dense(layer).norm(dim=1), rtol=1e-5) and torch.allclose(
            layer(x), expected, atol=1e-5
        )

    before = layer.norms()
    with table.only(torch.tensor([True, False, True, True])):
        assert agrees()
        assert not torch.allclose(layer.norms(), before, rtol=1e-3)
    assert torch.equal(layer.norms(), before)
    table.keep(torch.tensor([True, True, False, True]), final=False)  # silenced
    assert agrees()
    table.keep(torch.tensor([True, True, False, False]), final=True)  # dropped
    silenced, outputs = layer.norms(), layer(x)
    assert agrees()
    table.compact()
    assert layer.rank == 2
    assert torch.allclose(layer.norms(), silenced, rtol=1e-6)
    assert torch.allclose(layer(x), outputs, atol=1e-6)
    table.grow(0, 3)
    assert layer.rank == 5
    assert torch.allclose(layer.norms(), silenced, rtol=1e-6)
    with torch.no_grad():
        layer.b.normal_()
    assert agrees()


def test_the_magnitude_outlives_the_last_component() -> None:
    model = nn.Sequential(nn.Linear(10, 6))
    model.requires_grad_(False)
    layers = inject(model, ["0"], WeightDecomposed(), [2])
    layer, emptied = layers["0"], []
    table = UnitTable(layers)
    table.on_empty = emptied.append
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=0.1, weight_decay=0.5))
    table.keep(torch.zeros(2, dtype=torch.bool), final=True)
    table.compact(optimizer)
    assert not emptied
    assert model[0] is layer
    x = torch.randn(3, 10)
    layer(x).sum().backward()
    before = layer.magnitude.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.magnitude, before)
    assert isinstance(layer, WeightDecomposedLayer)
    assert torch.allclose(layer(x), x @ rescaled(layer).T + layer.bias, atol=1e-5)


def test_magnitudes_neither_decay_nor_count() -> None:
    model = nn.Sequential(nn.Linear(10, 6))
    layers = inject(model, ["0"], WeightDecomposed(), [2])
    groups = parameter_groups(layers, lr=1.0, weight_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    layer = layers["0"]
    assert (decay[id(layer.a)], decay[id(layer.b)], decay[id(layer.magnitude)]) == (0.5, 0.5, 0.0)
    assert layer.unit_costs() == [16, 16]


@both_layouts
def test_a_plain_pair_as_the_start_is_that_pairs_function(base: nn.Module) -> None:
    layer = WeightDecomposed(alpha=6.0).layer(base, 3)
    a, b = torch.randn(2, 10), torch.randn(6, 2)
    layer.load_low_rank(a, b)
    x = torch.randn(4, 10)
    assert torch.allclose(layer(x), base(x) + x @ (b @ a).T, atol=1e-5)
    with pytest.raises(UserError, match="init_from"):
        layer.load_low_rank(torch.randn(4, 10), torch.randn(6, 4))


def test_switched_off_it_is_its_base() -> None:
    layer = shaken(nn.Linear(10, 6))
    layer.active = False
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), layer.base_layer(x))
