"""Every parametrisation: identity at the start, its mathematics, its folding into a plain pair, transposed weights."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_cli.adapters.aflora import Aflora
from dora_cli.adapters.base import LowRankLayer, is_transposed, linear_shape
from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject, parameter_groups, remove
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.svd import Svd
from dora_cli.errors import UserError

PARTS = [Lora(alpha=16.0), Components(alpha=8.0), Svd(alpha=16.0), Aflora(freeze_square=False)]
IDS = ["lora", "components", "svd", "aflora"]


def shaken(layer: nn.Module) -> None:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            assert "base" not in name
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)


@pytest.mark.parametrize("part", PARTS, ids=IDS)
@pytest.mark.parametrize("base", [nn.Linear(10, 6), Conv1D(6, 10)], ids=["linear", "conv1d"])
def test_output_at_the_start_is_the_base_models_bit_for_bit(part: Any, base: nn.Module) -> None:
    x = torch.randn(5, 3, 10)
    layer = part.layer(base, 4)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("part", PARTS, ids=IDS)
@pytest.mark.parametrize("base", [nn.Linear(10, 6), Conv1D(6, 10)], ids=["linear", "conv1d"])
def test_forward_is_the_base_plus_delta_weight(part: Any, base: nn.Module) -> None:
    layer = part.layer(base, 4)
    shaken(layer)
    x = torch.randn(5, 3, 10)
    assert (layer.d_out, layer.d_in, layer.transposed) == (6, 10, isinstance(base, Conv1D))
    delta = layer.delta_weight()
    assert delta.shape == (6, 10)
    assert torch.allclose(layer(x), base(x) + x @ delta.T, atol=1e-5)
    a, b = layer.low_rank()
    assert a.shape == (4, 10)
    assert b.shape == (6, 4)
    assert torch.linalg.matrix_rank(delta) <= 4


def test_components_are_the_sum_of_scaled_outer_products() -> None:
    layer = Components(alpha=8.0).layer(nn.Linear(7, 5), 4)
    shaken(layer)
    dense = sum(8 / 4 * layer.c[i] * torch.outer(layer.b[:, i], layer.a[i]) for i in range(4))
    assert torch.allclose(layer.delta_weight(), dense, atol=1e-6)  # type: ignore[arg-type]


def test_aflora_multiplies_features_by_both_vectors() -> None:
    layer = Aflora(freeze_square=False).layer(nn.Linear(7, 5), 3)
    shaken(layer)
    dense = torch.diag(layer.s_b) @ layer.b @ torch.diag(layer.s_d) @ layer.a
    assert torch.allclose(layer.delta_weight(), dense, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "bounds"),
    [
        (Lora(), (1 / 768**0.5, 0.0)),
        (Components(), ((6 / 768) ** 0.5, (6 / 12) ** 0.5)),
    ],
    ids=["lora", "components"],
)
def test_initial_bounds_are_the_published_ones(part: Any, bounds: tuple[float, float]) -> None:
    layer = part.layer(nn.Linear(768, 768), 12)
    assert float(layer.a.abs().max()) == pytest.approx(bounds[0], rel=1e-3)
    assert float(layer.b.abs().max()) == pytest.approx(bounds[1], rel=1e-3)


def test_svd_starts_at_twenty_thousandths() -> None:
    layer = Svd().layer(nn.Linear(768, 768), 12)
    assert float(layer.a.std()) == pytest.approx(0.02, rel=0.05)
    assert float(layer.b.std()) == pytest.approx(0.02, rel=0.05)
    assert not bool(layer.c.any())


def test_first_step_of_components_moves_only_the_gates() -> None:
    layer = Components().layer(nn.Linear(8, 8), 3)
    layer(torch.randn(4, 8)).square().sum().backward()
    assert not bool(layer.a.grad.any())
    assert not bool(layer.b.grad.any())
    assert bool((layer.c.grad != 0).all())


@pytest.mark.parametrize("part", [Lora(), Components(), Svd()], ids=IDS[:3])
def test_silenced_units_add_nothing_and_the_others_all(part: Any) -> None:
    layer = part.layer(nn.Linear(8, 8), 3)
    shaken(layer)
    a, b = layer.low_rank()
    expected = b[:, [0, 2]] @ a[[0, 2]]
    layer.silence(torch.tensor([1]))
    assert torch.allclose(layer.delta_weight(), expected, atol=1e-6)


@pytest.mark.parametrize("part", [Lora(), Components(), Svd()], ids=IDS[:3])
def test_fresh_units_leave_the_function_as_it_is(part: Any) -> None:
    layer = part.layer(nn.Linear(8, 6), 3)
    shaken(layer)
    fresh = layer.fresh(2)
    gate = fresh.get("c", torch.ones(2))
    assert not bool((fresh["b"] * gate @ fresh["a"]).any())
    assert {k: tuple(v.shape) for k, v in fresh.items() if k != "c"} == {"a": (2, 8), "b": (6, 2)}


@pytest.mark.parametrize("part", [Lora(alpha=4.0), Components(alpha=4.0), Svd(alpha=4.0)], ids=IDS[:3])
def test_a_trained_pair_can_be_the_start(part: Any) -> None:
    layer = part.layer(nn.Linear(8, 6), 4)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    layer.load_low_rank(a, b)
    assert torch.allclose(layer.delta_weight(), b @ a, atol=1e-5)
    with pytest.raises(UserError, match="init_from"):
        layer.load_low_rank(torch.randn(5, 8), torch.randn(6, 5))


def test_probe_mask_closes_units_without_touching_parameters() -> None:
    layer = Components().layer(nn.Linear(8, 8), 3)
    shaken(layer)
    x, before = torch.randn(4, 8), layer.c.detach().clone()
    layer.probe_mask = torch.zeros(3)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.probe_mask = None
    assert torch.equal(layer.c, before)


def test_bf16_base_gets_float32_adapters_and_bf16_outputs() -> None:
    base = nn.Linear(8, 8).to(torch.bfloat16)
    layer = Components().layer(base, 3)
    shaken(layer)
    assert layer.a.dtype == torch.float32
    assert layer(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_inject_replaces_on_the_parent_and_remove_puts_the_base_back() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    base = model[0][0]  # type: ignore[index]
    layers = inject(model, ["0.0"], Lora(), [2])
    assert isinstance(model[0][0], LowRankLayer)  # type: ignore[index]
    assert layers["0.0"].base_layer is base
    with pytest.raises(UserError, match="already"):
        inject(model, ["0.0"], Lora(), [2])
    remove(model, "0.0")
    assert model[0][0] is base  # type: ignore[index]
    with pytest.raises(UserError, match="no module"):
        inject(model, ["0.7"], Lora(), [2])


def test_only_linear_modules_have_a_shape() -> None:
    assert linear_shape(nn.Linear(3, 7)) == (7, 3)
    assert linear_shape(Conv1D(7, 3)) == (7, 3)
    assert is_transposed(Conv1D(7, 3))
    with pytest.raises(UserError, match="Embedding"):
        linear_shape(nn.Embedding(3, 7))


def test_gates_do_not_decay_unless_the_official_code_is_followed() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    layers = inject(model, ["0"], Components(), [2])
    decay = {id(p): g["weight_decay"] for g in parameter_groups(layers, lr=1.0, weight_decay=0.5) for p in g["params"]}
    layer = layers["0"]
    assert (decay[id(layer.a)], decay[id(layer.b)], decay[id(layer.c)]) == (0.5, 0.5, 0.0)
    remove(model, "0")
    layers = inject(model, ["0"], Components(decay_gates=True), [2])
    assert [g["weight_decay"] for g in parameter_groups(layers, lr=1.0, weight_decay=0.5)] == [0.5]


def test_aflora_units_are_its_projections_and_square_ones_start_frozen() -> None:
    square, wide = Aflora().layer(nn.Linear(6, 6), 2), Aflora().layer(nn.Linear(6, 12), 2)
    assert square.frozen_units() == [True, True]
    assert wide.frozen_units() == [False, False]
    assert wide.unit_costs() == [12, 24]
    wide.freeze(torch.tensor([1]))
    assert wide.frozen_units() == [False, True]
    wide.thaw(torch.tensor([1]))
    assert wide.b.requires_grad
