"""What a gated layer promises, in training, in evaluation and after the final choice."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dora_cli.adapters.gated import Gated, GatedLayer
from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.adapters.quantise import BITS, SWITCH_OFF, sampled
from dora_cli.adapters.resize import check_state, resize

SHUT = -20.0


def gated(d_in: int = 10, d_out: int = 6, rank: int = 4, seed: int = 0, **options: Any) -> GatedLayer:
    torch.manual_seed(seed)
    return Gated(**options).layer(nn.Linear(d_in, d_out), rank)


def set_gate(layer: GatedLayer, name: str, index: Any, value: float) -> None:
    with torch.no_grad():
        getattr(layer, name)[index] = value


def update(layer: GatedLayer, x: torch.Tensor) -> torch.Tensor:
    """What the layer adds to its base, without a graph."""
    with torch.no_grad():
        return layer.update(x)


@pytest.mark.parametrize("base", [nn.Linear(10, 6), Conv1D(6, 10)], ids=["linear", "conv1d"])
def test_forward_is_the_base_plus_the_exported_update(base: nn.Module) -> None:
    layer = Gated(alpha=8.0).layer(base, 4).eval()
    set_gate(layer, "phi", 2, SHUT)
    set_gate(layer, "bit_logits", (1, 1), SHUT)
    x = torch.randn(5, 3, 10)
    assert torch.allclose(layer(x), base(x) + x @ layer.delta_weight().T, atol=1e-6)
    assert (layer.delta_weight().abs() > 0).any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("n_bits", "finest"), [(16, 65535), (8, 255), (32, 2**32 - 1)])
def test_all_gates_open_reproduce_the_float_update_within_the_last_step(
    n_bits: int, finest: int, training: bool
) -> None:
    layer = gated(d_in=32, d_out=24, rank=5, n_bits=n_bits).train(training)
    set_gate(layer, "phi", slice(None), 40.0)  # at 6 one draw in ten is below 1 somewhere
    set_gate(layer, "bit_logits", slice(None), 40.0)
    x = torch.randn(7, 32)
    with torch.no_grad():
        exact = (x @ layer.a.T * layer.c) @ layer.b.T
        half = layer.log_ranges.exp() / finest + 1e-6 * layer.log_ranges.exp()  # s/2 of A, B, E, and float32's own
        # |Π(t + δ) − Π t| over the three factors, summed as the product is
        a, b, c = layer.a.abs(), layer.b.abs(), layer.c.abs()
        bound = ((x.abs() @ (a + half[0]).T) * (c + half[2])) @ (b + half[1]).T - ((x.abs() @ a.T) * c) @ b.T
    difference = (update(layer, x) - exact).abs()
    assert bool((difference <= bound + 1e-7).all())
    if n_bits == 8:
        assert float(difference.max()) > 1e-6  # there was something to lose


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("j", [1, 2, 3])
def test_a_shut_rank_gate_removes_its_component_and_all_after_it_exactly(j: int, training: bool) -> None:
    layer = gated().train(training)
    set_gate(layer, "bit_logits", slice(None), 40.0)
    set_gate(layer, "phi", slice(None), 40.0)
    x = torch.randn(5, 10)
    with torch.no_grad():
        a, b = layer.factors()
        c = layer.gates()
        expected = (x @ a[:j].T * c[:j]) @ b[:, :j].T
    set_gate(layer, "phi", j, SHUT)
    assert torch.allclose(update(layer, x), expected, atol=1e-7)
    a_out, b_out = layer.low_rank()
    assert not bool(b_out[:, j:].any()) and bool(b_out[:, :j].any())
    with torch.no_grad():  # exactly: what they are does not matter
        layer.a[j:], layer.b[:, j:], layer.c[j:] = 1e6, 1e6, 1e6
    before = layer.log_ranges.detach().clone()
    assert torch.equal(layer.log_ranges, before)
    assert torch.allclose(update(layer, x), expected, atol=1e-7)
    assert a_out.shape == (4, 10)


def test_one_component_always_takes_part() -> None:
    layer = gated().eval()
    set_gate(layer, "phi", slice(None), SHUT)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 1
    assert (layer.gates() != 0).tolist() == [True, False, False, False]


def test_noise_is_drawn_in_training_alone_and_averages_to_the_closed_form() -> None:
    layer = gated(rank=2)
    set_gate(layer, "phi", 1, 0.0)
    x = torch.randn(1, 10)
    layer.train()
    draws = {round(float(update(layer, x).sum()), 6) for _ in range(30)}
    assert len(draws) > 1
    torch.manual_seed(0)
    reached = torch.stack([layer._drawn()[1].detach() for _ in range(4000)])
    assert set(reached.unique().tolist()) == {0.0, 1.0}  # the product is rounded
    z = sampled(torch.zeros(100_000))
    assert float(reached[:, 1].mean()) == pytest.approx(float((z > 0.5).float().mean()), abs=0.03)
    layer.eval()
    assert len({float(update(layer, x).sum()) for _ in range(5)}) == 1


@pytest.mark.parametrize(("logit", "opens"), [(SWITCH_OFF, False), (SWITCH_OFF + 0.01, True)])
def test_a_low_bit_gate_switches_itself_and_all_higher_ones_off_in_training(logit: float, opens: bool) -> None:
    layer = gated().train()
    set_gate(layer, "bit_logits", 0, 40.0)
    set_gate(layer, "bit_logits", (0, 1), logit)
    torch.manual_seed(0)
    drawn = torch.stack([layer._drawn()[0].detach() for _ in range(500)])
    assert bool(drawn[:, 0, 1:].any()) is opens
    assert bool((drawn[:, 0, 0] == 1).all())
    assert bool(drawn[:, 1:, 1:].any())  # the other tensors' gates are their own


def test_settling_opens_the_rank_gates_for_good_and_ends_all_noise() -> None:
    layer = gated().train()
    set_gate(layer, "phi", slice(1, None), SHUT)
    set_gate(layer, "bit_logits", (0, slice(1, None)), SHUT)
    layer.settle()
    x = torch.randn(3, 10)
    outputs = [update(layer, x) for _ in range(5)]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 4
    assert layer.side_state()["bits"].tolist() == [4, 16, 16]
    layer.eval()
    assert torch.equal(update(layer, x), outputs[0])  # trained as it is evaluated
    layer.train()
    layer(x).sum().backward()
    assert layer.phi.grad is None and layer.bit_logits.grad is None
    assert layer.a.grad is not None and layer.log_ranges.grad is not None


def test_gradients_reach_everything_that_is_learned() -> None:
    layer = gated().train()
    set_gate(layer, "phi", slice(None), 0.0)
    set_gate(layer, "bit_logits", slice(None), 0.5)
    total = {name: torch.zeros_like(p) for name, p in layer.adapter_parameters().items()}
    torch.manual_seed(0)
    for _ in range(60):
        layer.zero_grad()
        layer(torch.randn(4, 10)).square().sum().backward()
        for name, parameter in layer.adapter_parameters().items():
            total[name] += parameter.grad.abs()  # type: ignore[operator]
    assert float(total["phi"][0]) == 0.0
    assert bool((total.pop("phi")[1:] > 0).all())
    for name, gradient in total.items():
        assert bool((gradient > 0).all()), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_under_gradient_checkpointing_draws_the_same_noise(dropout: float) -> None:
    layer = gated(dropout=dropout).train()
    set_gate(layer, "phi", slice(None), 0.0)
    set_gate(layer, "bit_logits", slice(None), 0.0)
    x = torch.randn(6, 10)
    found = []
    for recompute in (False, True):
        layer.zero_grad()
        torch.manual_seed(7)
        out = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        torch.rand(13)  # the generator moves on between the forward pass and its recomputation
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in layer.adapter_parameters().values())])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_the_start_is_the_published_one_and_no_identity() -> None:
    layer = gated(d_in=768, d_out=768, rank=12)
    a, b, c = (float(t.detach().std()) for t in (layer.a, layer.b, layer.c))
    assert (a, b) == (pytest.approx(0.02, rel=0.05), pytest.approx(0.02, rel=0.05))
    assert 0.4 < c < 1.7
    assert bool((layer.phi == 6).all()) and bool((layer.bit_logits == 6).all())
    assert layer.bit_logits.shape == (3, 3)
    assert layer.log_ranges.exp().tolist() == pytest.approx(
        [float(t.detach().abs().max()) for t in (layer.a, layer.b, layer.c)], rel=1e-4
    )
    assert bool(layer.delta_weight().any())


@pytest.mark.parametrize("n_bits", BITS)
def test_gates_above_the_largest_bit_width_do_not_exist(n_bits: int) -> None:
    layer = gated(n_bits=n_bits)
    assert layer.bit_logits.shape == (3, BITS.index(n_bits))
    assert layer.side_state()["bits"].tolist() == [n_bits] * 3
    layer.train()
    layer(torch.randn(2, 10)).sum().backward()
    assert layer.a.grad is not None


def test_a_range_is_never_zero() -> None:
    layer = gated(rank=1)
    with torch.no_grad():
        layer.b.zero_()
        layer.c.zero_()
    layer.calibrate()
    assert bool((layer.log_ranges.exp() > 0.015).all())
    layer(torch.randn(3, 10)).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.adapter_parameters().values() if p.grad is not None)


def test_given_rows_start_as_the_identity() -> None:
    layer = gated(d_in=16).train()
    rows = torch.linalg.qr(torch.randn(16, 4))[0].T
    layer.start_from_rows(rows)
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert float(layer.log_ranges[0].detach().exp()) == pytest.approx(float(rows.abs().max()), rel=1e-4)
    layer(x).sum().backward()
    assert layer.b.grad is not None and bool(layer.b.grad.any())


def test_a_trained_pair_can_be_the_start_within_its_quantisation() -> None:
    layer = gated(d_in=8, d_out=6).eval()
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    layer.load_low_rank(a, b)
    assert torch.allclose(layer.delta_weight(), b @ a, atol=1e-3)


def test_probe_mask_and_silence_close_units_exactly() -> None:
    layer = gated().eval()
    x = torch.randn(4, 10)
    layer.probe_mask = torch.zeros(4)
    assert not bool(update(layer, x).any())
    layer.probe_mask = None
    a, b = layer.low_rank()
    layer.silence(torch.tensor([3]))
    assert torch.allclose(layer.delta_weight(), b[:, :3] @ a[:3], atol=1e-7)


def test_bf16_base_gets_float32_adapters_and_bf16_outputs() -> None:
    layer = Gated().layer(nn.Linear(8, 8).to(torch.bfloat16), 3)
    assert {p.dtype for p in layer.adapter_parameters().values()} == {torch.float32}
    assert layer(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gates_and_ranges_have_their_own_rates_and_do_not_decay() -> None:
    layers = inject(nn.Sequential(nn.Linear(4, 4)), ["0"], Gated(gate_learning_rate=0.3, range_learning_rate=0.2), [2])
    groups = parameter_groups(layers, lr=1.0, weight_decay=0.5)
    settings_of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: settings_of[id(p)] for name, p in layers["0"].adapter_parameters().items()}
    assert found == {
        "a": (1.0, 0.5),
        "b": (1.0, 0.5),
        "c": (1.0, 0.0),
        "phi": (0.3, 0.0),
        "bit_logits": (0.3, 0.0),
        "log_ranges": (0.2, 0.0),
    }


def test_shrinking_carries_logits_and_their_moments() -> None:
    layers = inject(nn.Sequential(nn.Linear(10, 6)), ["0"], Gated(), [4])
    layer: Any = layers["0"]
    set_gate(layer, "phi", slice(None), 0.3)
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=1e-2, weight_decay=0.1), fused=True)
    for _ in range(20):
        layer(torch.randn(3, 10)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    logits, moment = layer.phi.detach().clone(), optimizer.state[layer.phi]["exp_avg_sq"].clone()
    assert bool((moment[1:] > 0).all())
    resize(layer, torch.arange(2), 0, optimizer)
    check_state(optimizer)
    assert torch.equal(layer.phi.detach(), logits[:2])
    assert torch.equal(optimizer.state[layer.phi]["exp_avg_sq"], moment[:2])
    layer(torch.randn(3, 10)).sum().backward()
    optimizer.step()


def test_side_state_is_what_inference_does_not_need() -> None:
    layer = gated()
    set_gate(layer, "bit_logits", (2, 0), SHUT)
    state = layer.side_state()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "bits": (3,),
        "ranges": (3,),
        "bit_logits": (3, 3),
        "rank_logits": (4,),
    }
    assert state["bits"].tolist() == [16, 16, 2]
    assert not any(value.requires_grad for value in state.values())


def test_it_learns_through_the_noise_and_goes_on_without_it() -> None:
    """At a rate at which factors run out of their ranges within a few steps, and must find back."""
    layers = inject(nn.Sequential(nn.Linear(10, 6)), ["0"], Gated(), [4])
    layer: Any = layers["0"]
    layer.train()
    torch.manual_seed(1)
    target = torch.randn(6, 2) @ torch.randn(2, 10)
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=3e-2, weight_decay=0.0))
    errors = []
    for step in range(400):
        x = torch.randn(32, 10)
        error = (layer.update(x) - x @ target.T).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(float(error.detach()))
        if step == 200:
            layer.settle()
    assert min(errors[150:200]) < errors[0] / 10
    assert errors[-1] < errors[0] / 1000
