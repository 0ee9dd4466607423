"""MoRA and its components: METHODS 9's properties against definitions written out, in float64."""

from math import ceil, cos, sin
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_cli.adapters.components import Components
from dora_cli.adapters.init.open_gates import OpenGates
from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.adapters.mora import Mora, RotationLayer, SharingLayer, folded, rotation_delta, sharing_factors, wrapped
from dora_cli.adapters.mora_components import MoraComponents, MoraComponentsLayer
from dora_cli.allocation.importance.component_norm import component_norms
from dora_cli.allocation.select import top
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError

PARTS = [Mora(), Mora(kind="sharing"), MoraComponents()]
IDS = ["rotation", "sharing", "components"]
SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 6))  # d_out, d_in, half of the side


def compression(side: int, d_in: int) -> Tensor:
    """C: how often input i lies at a padded place p ≡ j."""
    c = torch.zeros(side, d_in, dtype=torch.float64)
    for p in range(ceil(d_in / side) * side):
        c[p % side, p % d_in] += 1
    return c


def decompression(side: int, d_out: int) -> Tensor:
    """D: 1 where output k ≡ j."""
    return torch.tensor([[float(k % side == j) for j in range(side)] for k in range(d_out)], dtype=torch.float64)


def rotated(m: Tensor, x: list[float], d_out: int) -> Tensor:
    """MoRA's type 6 for one input, pair by pair."""
    side, half = len(m), len(m) // 2
    out: list[Tensor] = []
    for j in range(ceil(len(x) / side)):
        block = [x[(j * side + k) % len(x)] for k in range(side)]
        turned = torch.zeros(side, dtype=torch.float64)
        for k in range(half):
            angle = j * 10000 ** (-2 * k / side)
            turned[k] = block[k] * cos(angle) - block[k + half] * sin(angle)
            turned[k + half] = block[k + half] * cos(angle) + block[k] * sin(angle)
        out += list(m @ turned)
    return torch.stack([out[k % len(out)] for k in range(d_out)])


def by_definition(layer: nn.Module) -> Tensor:
    """ΔW in float64."""
    d_out, d_in = layer.d_out, layer.d_in
    if isinstance(layer, RotationLayer):
        return torch.stack([rotated(layer.m.double(), row, d_out) for row in torch.eye(d_in).tolist()], dim=1).detach()
    if isinstance(layer, SharingLayer):
        middle = layer.m.double()
    else:
        middle = layer.b.double() @ torch.diag(layer.c.double()) @ layer.a.double()
    return (decompression(len(middle), d_out) @ middle @ compression(len(middle), d_in)).detach()


def shaken(layer: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer


def whole_cost(layer: Any) -> list[int]:
    return UnitTable({"0": layer}, "modules").cost.tolist()


@pytest.mark.parametrize("part", PARTS, ids=IDS)
@pytest.mark.parametrize("base", [nn.Linear(11, 7), Conv1D(7, 11)], ids=["linear", "conv1d"])
def test_output_at_the_start_is_the_base_models_bit_for_bit(part: Any, base: nn.Module) -> None:
    x = torch.randn(5, 3, 11)
    assert torch.equal(part.layer(base, 3)(x), base(x))


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_forward_is_the_defined_delta_weight_for_every_size(sizes: tuple[int, int, int]) -> None:
    """In float64 to 1e-12: sides that divide and that do not, above the input and above the output."""
    d_out, d_in, half = sizes
    torch.manual_seed(0)
    base, x = nn.Linear(d_in, d_out).double(), torch.randn(2, 3, d_in, dtype=torch.float64)
    square = torch.randn(2 * half, 2 * half, dtype=torch.float64)
    v, u = torch.randn(3, half, dtype=torch.float64), torch.randn(half, 3, dtype=torch.float64)
    gates = torch.randn(3, dtype=torch.float64)
    for layer in (
        RotationLayer(base, square, 0.0),
        SharingLayer(base, square, 0.0),
        SharingLayer(base, square[:half, :half], 0.0),
        MoraComponentsLayer(base, v, u, gates, 1.0, 0.0),
    ):
        expected = x @ by_definition(layer).T
        torch.testing.assert_close(layer(x) - base(x), expected, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_delta_weights_closed_forms_are_the_definitions(sizes: tuple[int, int, int]) -> None:
    d_out, d_in, half = sizes
    torch.manual_seed(0)
    base, m = nn.Linear(d_in, d_out), torch.randn(2 * half, 2 * half)
    rotation = RotationLayer(base, m, 0.0)
    torch.testing.assert_close(rotation_delta(m.double(), d_out, d_in), by_definition(rotation), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.delta_weight(), by_definition(rotation).float(), rtol=0, atol=1e-5)
    eye = torch.eye(len(m), dtype=torch.float64)
    a, b = sharing_factors(m.double(), eye, d_out, d_in)
    assert (a.shape, b.shape) == ((len(m), d_in), (d_out, len(m)))
    torch.testing.assert_close(b @ a, by_definition(SharingLayer(base, m, 0.0)), rtol=0, atol=1e-12)


def test_the_fixture_by_hand() -> None:
    """METHODS 0.8: (1 … 5) is padded to (1, 2, 3, 4, 5, 1) and compressed to (5, 7, 4); M = I gives (5, 7, 4, 5)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert wrapped(x, 6).tolist() == [1, 2, 3, 4, 5, 1]
    layer = SharingLayer(nn.Linear(5, 4), torch.eye(3), 0.0)
    assert (layer(x) - layer.base_layer(x)).tolist() == pytest.approx([5, 7, 4, 5], abs=1e-5)
    assert folded(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 5).tolist() == [7, 2, 3, 4, 5]


@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 17])
def test_folding_is_the_adjoint_of_wrapping(length: int) -> None:
    x, y = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, length, dtype=torch.float64)
    assert float((wrapped(x, length) * y).sum()) == pytest.approx(float((x * folded(y, 5)).sum()), abs=1e-12)


def test_sharing_has_the_rank_of_its_side_and_rotation_a_higher_one() -> None:
    torch.manual_seed(0)
    base = nn.Linear(24, 24)
    sharing, rotation = shaken(Mora(kind="sharing").layer(base, 2)), shaken(Mora().layer(base, 2))
    assert sharing.rank == 9  # ⌊√96⌋
    assert rotation.rank == 8  # even
    assert torch.linalg.matrix_rank(sharing.delta_weight()) == 9
    assert torch.linalg.matrix_rank(rotation.delta_weight()) == 24  # METHODS 9


@pytest.mark.parametrize("rank", [1, 2, 8, 13])
@pytest.mark.parametrize(("d_out", "d_in"), [(768, 768), (3072, 768), (768, 3072), (5, 3), (64, 7)])
def test_the_square_is_the_largest_that_costs_no_more_than_the_lora(d_out: int, d_in: int, rank: int) -> None:
    base = nn.Linear(d_in, d_out)
    side, even = Mora(kind="sharing").layer(base, rank).rank, Mora().layer(base, rank).rank
    lora = (d_in + d_out) * rank
    assert 0 <= lora - side**2 <= 2 * side + 1
    assert even in (side, side - 1)
    assert even % 2 == 0
    assert whole_cost(Mora().layer(base, rank)) == [even**2]


def test_sharing_is_exactly_its_low_rank_pair_and_rotation_says_it_has_none() -> None:
    sharing, rotation = shaken(Mora(kind="sharing").layer(nn.Linear(23, 17), 2)), Mora().layer(nn.Linear(23, 17), 2)
    a, b = sharing.low_rank()
    assert (a.shape, b.shape) == ((8, 23), (17, 8))
    torch.testing.assert_close((b @ a).double(), by_definition(sharing), rtol=0, atol=1e-6)
    assert set(b.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(NotImplementedError):
        rotation.low_rank()
    assert (Mora().export, Mora(kind="sharing").export) == ("square", "lora")


def test_input_blocks_beyond_the_output_are_not_read() -> None:
    layer = shaken(Mora().layer(nn.Linear(40, 8), 2))
    assert layer.rank == 8
    delta = layer.delta_weight()
    assert bool(delta[:, :8].any())
    assert not bool(delta[:, 8:].any())


@pytest.mark.parametrize("part", PARTS, ids=IDS)
def test_a_transposed_base_gives_the_same_as_its_linear_twin(part: Any) -> None:
    linear, conv = nn.Linear(11, 7), Conv1D(7, 11)
    conv.weight.data, conv.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    torch.manual_seed(0)
    one = shaken(part.layer(linear, 3))
    torch.manual_seed(0)
    two = shaken(part.layer(conv, 3))
    x = torch.randn(2, 11)
    assert two.transposed
    torch.testing.assert_close(one(x), two(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(two(x) - conv(x), x @ two.delta_weight().T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", PARTS, ids=IDS)
def test_half_precision_bases_and_autocast_get_outputs_of_their_type(part: Any) -> None:
    torch.manual_seed(0)
    layer, x = shaken(part.layer(nn.Linear(24, 20), 3)), torch.randn(4, 24)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        for given_x in (x, x.bfloat16()):  # a layer may follow one that was cast already
            cast = layer(given_x)
            assert cast.dtype == torch.bfloat16
            torch.testing.assert_close(cast.float(), exact, rtol=0.05, atol=0.05)
    half = shaken(part.layer(nn.Linear(24, 20).bfloat16(), 3))
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters(recurse=False)} == {torch.float32}


def test_angles_are_no_part_of_the_state_and_the_square_decays_as_a_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.requires_grad_(False)
    layers = inject(model, ["0"], Mora(), [2])
    assert set(model.state_dict()) == {"0.m", "0.base_layer.weight", "0.base_layer.bias"}
    groups = parameter_groups(layers, lr=1.0, weight_decay=0.5)
    assert [(g["weight_decay"], [p is layers["0"].m for p in g["params"]]) for g in groups] == [(0.5, [True])]


@pytest.mark.parametrize("kind", ["rotation", "sharing"])
def test_any_square_of_its_kind_can_be_learned(kind: str) -> None:
    torch.manual_seed(0)
    target, learner = (Mora(kind=kind).layer(nn.Linear(12, 10), 2) for _ in range(2))
    learner.base_layer = target.base_layer.requires_grad_(False)
    shaken(target)
    optimizer, x = torch.optim.Adam(learner.parameters(recurse=False), lr=0.05), torch.randn(64, 12)
    for _ in range(200):
        optimizer.zero_grad()
        (learner(x) - target(x).detach()).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(learner.m, target.m, rtol=0, atol=1e-3)


@pytest.mark.parametrize("part", [Mora(dropout=0.5), Mora(kind="sharing", dropout=0.5)], ids=IDS[:2])
def test_dropout_falls_on_the_input_in_training_only(part: Any) -> None:
    torch.manual_seed(0)
    layer, x = shaken(part.layer(nn.Linear(8, 8), 2)), torch.ones(1, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ layer.delta_weight().T, rtol=0, atol=1e-5)


def test_a_module_too_small_for_a_pair_has_no_square_and_stays_its_base() -> None:
    layer, x = Mora().layer(nn.Linear(1, 1), 1), torch.randn(3, 1)  # ⌊√2⌋ = 1, which no pair fits
    assert layer.rank == 0
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.delta_weight().tolist() == [[0.0]]


# ---- components ---------------------------------------------------------------------------------------------------


def test_components_with_the_squares_own_singular_vectors_are_the_square() -> None:
    torch.manual_seed(0)
    base, m = nn.Linear(23, 17).double(), torch.randn(6, 6, dtype=torch.float64)
    u, s, v = torch.linalg.svd(m)
    x = torch.randn(4, 23, dtype=torch.float64)
    components = MoraComponentsLayer(base, v, u, s, 1.0, 0.0)
    torch.testing.assert_close(components(x), SharingLayer(base, m, 0.0)(x), rtol=0, atol=1e-12)


def test_component_norms_are_those_of_the_unfolded_rank_one_pieces() -> None:
    """‖ΔW_i‖ = |c_i|·‖D u_i‖·‖Cᵀ v_i‖, and the total from the same Gram matrices."""
    torch.manual_seed(0)
    layer = shaken(MoraComponents(square_rank=2).layer(nn.Linear(23, 17), 4))
    assert layer.side == 8
    (group,) = UnitTable({"0": layer}).groups()
    norms, total = component_norms(*group.factors(), group.gates())
    d, c = decompression(8, 17), compression(8, 23)
    for i in range(4):
        piece = layer.c[i].double() * torch.outer(d @ layer.b[:, i].double(), c.T @ layer.a[i].double())
        assert float(norms[0, i]) == pytest.approx(float(piece.detach().norm()), rel=1e-5)
    assert float(total[0]) == pytest.approx(float(by_definition(layer).norm()), rel=1e-5)


def test_a_component_costs_its_two_vectors_in_the_square() -> None:
    part = MoraComponents(square_rank=8)
    layer = part.layer(nn.Linear(768, 768), 5)
    assert layer.side == 110  # ⌊√(1536 · 8)⌋
    assert part.unit_cost(768, 768) == 220
    assert layer.unit_costs() == [220] * 5
    assert layer.a.numel() + layer.b.numel() == 5 * 220


def test_a_budget_in_parameters_counts_u_and_v() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 48))
    table = UnitTable(inject(model, ["0", "1"], MoraComponents(square_rank=1), [4, 4]))  # sides 5 and 8
    assert table.cost.tolist() == [10] * 4 + [16] * 4
    kept = top(table, torch.tensor([5.0, 4.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0]), 58, by_cost=True)
    assert int(table.cost[kept].sum()) == 48  # three of 16; the fourth would make 64


def test_the_start_has_the_sizes_of_doras_components() -> None:
    torch.manual_seed(0)
    base = nn.Linear(768, 768)
    a, b = MoraComponents().layer(base, 12).factors()
    c, d = Components().layer(base, 12).factors()
    torch.testing.assert_close(a.norm(dim=1).mean(), c.norm(dim=1).mean(), rtol=0.1, atol=0)
    torch.testing.assert_close(b.norm(dim=0).mean(), d.norm(dim=0).mean(), rtol=0.1, atol=0)


def test_first_step_moves_only_the_gates() -> None:
    layer = MoraComponents().layer(nn.Linear(8, 8), 3)
    layer(torch.randn(4, 8)).square().sum().backward()
    assert not bool(layer.a.grad.any())
    assert not bool(layer.b.grad.any())
    assert bool((layer.c.grad != 0).all())


def test_silenced_components_add_nothing_and_fresh_ones_neither() -> None:
    torch.manual_seed(0)
    layer = shaken(MoraComponents(square_rank=2).layer(nn.Linear(23, 17), 3))
    a, b = layer.low_rank()
    layer.silence(torch.tensor([1]))
    torch.testing.assert_close(layer.delta_weight(), b[:, [0, 2]] @ a[[0, 2]], rtol=0, atol=1e-6)
    fresh = layer.fresh(2)
    assert {k: tuple(v.shape) for k, v in fresh.items()} == {"a": (2, 8), "b": (8, 2), "c": (2,)}
    assert not bool(fresh["c"].any())


def test_compaction_and_growth_keep_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(23, 17))
    table = UnitTable(inject(model, ["0"], MoraComponents(square_rank=2), [4]))
    shaken(table.layers[0])
    x = torch.randn(3, 23)
    table.keep(torch.tensor([True, False, True, False]), final=True)
    before = model(x)
    assert table.compact()
    table.grow(0, 3)
    assert table.layers[0].rank == 5
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert table.alive_cost() == 5 * 16


def test_open_gates_start_as_the_identity_too() -> None:
    layer, x = MoraComponents().layer(nn.Linear(24, 20), 3), torch.randn(2, 24)
    OpenGates().fill("0", layer)
    assert bool(layer.c.any())
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_low_rank_pair_cannot_be_its_start() -> None:
    layer = MoraComponents().layer(nn.Linear(8, 8), 3)
    with pytest.raises(UserError, match="cannot start from a low-rank adapter"):
        layer.load_low_rank(torch.randn(2, 8), torch.randn(8, 2))
