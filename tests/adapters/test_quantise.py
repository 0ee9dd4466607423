"""Hard-concrete gates against samples and closed forms, the quantiser against direct rounding in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_cli.adapters.quantise import (
    BITS,
    THRESHOLD,
    decided,
    effective_bits,
    first_open,
    nested,
    open_probability,
    quantise,
    sampled,
)


def open_up_to(bits: int) -> torch.Tensor:
    """Nested gates that leave ``bits`` bits, of a 32-bit quantiser."""
    return torch.tensor([float(b <= bits) for b in BITS[1:]])


# ---- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [-3.0, -0.935, 0.0, 1.5, 6.0])
def test_the_chance_of_an_open_gate_is_its_closed_form(phi: float) -> None:
    torch.manual_seed(0)
    z = sampled(torch.full((100_000,), phi))
    positive, one = float(open_probability(torch.tensor(phi))), float(torch.sigmoid(torch.tensor(phi - 1.5986)))
    for p, found in ((positive, (z > 0).float().mean()), (one, (z == 1).float().mean())):
        assert float(found) == pytest.approx(p, abs=5 * (p * (1 - p) / 1e5) ** 0.5 + 1e-5)  # five standard errors
    assert float(z.min()) >= 0 and float(z.max()) <= 1


def test_the_start_leaves_almost_every_gate_open_and_a_gate_shuts_at_a_third() -> None:
    assert float(open_probability(torch.tensor(6.0))) == pytest.approx(0.9995, abs=1e-5)
    assert pytest.approx(-0.935, abs=1e-3) == THRESHOLD
    assert 1 - float(open_probability(torch.tensor(THRESHOLD))) == pytest.approx(0.34, abs=1e-6)
    assert decided(torch.tensor([-0.94, -0.93])).tolist() == [0.0, 1.0]


def test_noise_at_its_extremes_is_finite_and_overrules_no_certain_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    for u in (0.0, 1.0):
        monkeypatch.setattr(torch, "rand_like", lambda x, u=u: torch.full_like(x, u))
        phi = torch.tensor([-40.0, 0.5, 40.0], requires_grad=True)
        z = sampled(phi)
        z.sum().backward()
        assert torch.isfinite(z).all() and torch.isfinite(phi.grad).all()  # type: ignore[arg-type]
        assert z[[0, 2]].tolist() == [0.0, 1.0]


def test_nested_gates_are_products_and_have_their_gradient() -> None:
    z = (torch.rand(3, 5, dtype=torch.float64) * 0.9 + 0.1).requires_grad_()
    weight = torch.randn(3, 5, dtype=torch.float64)
    ours = torch.autograd.grad((nested(z) * weight).sum(), z)[0]
    theirs = torch.autograd.grad((z.cumprod(-1) * weight).sum(), z)[0]
    assert torch.allclose(nested(z), z.cumprod(-1))
    assert torch.allclose(ours, theirs)


def test_behind_a_shut_gate_everything_is_exactly_zero_and_nothing_has_a_gradient() -> None:
    z = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.7], requires_grad=True)
    out = nested(z)
    assert out.tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    out.sum().backward()
    assert z.grad is not None and z.grad.tolist() == [1.5, 1.0, 0.0, 0.0, 0.0]


def test_the_first_rank_gate_is_open_whatever_its_logit() -> None:
    phi = torch.tensor([-20.0, 1.0, 2.0], requires_grad=True)
    out = first_open(open_probability(phi))
    out.sum().backward()
    assert float(out[0].detach()) == 1.0
    assert phi.grad is not None and float(phi.grad[0]) == 0.0 and bool((phi.grad[1:] > 0).all())


@pytest.mark.parametrize(("gates", "bits"), [("000", 2), ("011", 2), ("100", 4), ("101", 4), ("110", 8), ("111", 16)])
def test_effective_bits_follow_the_nested_gates(gates: str, bits: int) -> None:
    assert int(effective_bits(nested(torch.tensor([float(g) for g in gates])))) == bits


def test_effective_bits_are_always_a_power_on_offer() -> None:
    found = {int(effective_bits(nested((torch.rand(4) > 0.3).float()))) for _ in range(300)}
    assert found == set(BITS)


# ---- the quantiser ------------------------------------------------------------------------------------------------


def test_bits_of_the_hand_checked_number() -> None:
    """METHODS 0.8: s_2 = 1, x = 0.65."""
    x, x_max = torch.tensor([0.65]), torch.tensor(1.5)
    for bits, expected in ((2, 1.0), (4, 0.6), (8, 0.647059)):
        assert float(quantise(x, x_max, open_up_to(bits))) == pytest.approx(expected, abs=1e-6)
    assert abs(0.65 - 0.647059) <= 1 / 5 / 17 / 2


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20),
    x_max=st.floats(0.0078125, 8, width=32),
    bits=st.sampled_from(BITS),
)
def test_error_is_at_most_half_a_step_and_the_grid_is_that_of_direct_quantisation(
    values: list[float], x_max: float, bits: int
) -> None:
    x = torch.tensor(values)
    ours = quantise(x, torch.tensor(x_max), open_up_to(bits)).double()
    clipped = x.double().clamp(-x_max, x_max)
    step = 2 * x_max / (2**bits - 1)
    rounding = 8 * x_max * 2**-24  # a few float32 roundings of numbers up to x_max
    assert float((ours - clipped).abs().max()) <= step / 2 + x_max * 1.2e-7 + rounding
    assert float(ours.abs().max()) <= x_max + rounding
    if bits <= 16:  # the levels are step · integer; 32 bits are finer than float32 itself
        level = ours / step
        assert float((level - level.round()).abs().max()) <= rounding / step
        direct = (x.double().clamp(-x_max * (1 - 1e-7), x_max * (1 - 1e-7)) / step).round()
        ties = ((x.double() / step) % 1 - 0.5).abs() < 1e-3 + rounding / step  # rounded either way
        assert bool(((level - direct).abs() < 0.5)[~ties].all())


def test_the_edge_rounds_to_a_level_that_exists() -> None:
    for bits in (2, 4, 8, 16):
        out = quantise(torch.tensor([1.0, -1.0]), torch.tensor(1.0), open_up_to(bits))
        top = (2**bits // 2 - 1) * 2 / (2**bits - 1)  # (2^b/2 − 1) steps above zero
        assert out.tolist() == pytest.approx([top, -top], abs=1e-6)


def test_zero_stays_zero_at_every_bit_width() -> None:
    for bits in BITS:
        assert float(quantise(torch.zeros(1), torch.tensor(0.3), open_up_to(bits))) == 0.0


def test_half_open_bit_gates_weigh_their_levels() -> None:
    x, x_max = torch.tensor([0.37]), torch.tensor(1.2)
    parts = [quantise(x, x_max, open_up_to(b)) for b in (2, 4, 8, 16)]
    z = torch.tensor([0.5, 0.6, 0.7])
    expected = parts[0] + z[0] * (parts[1] - parts[0] + z[1] * (parts[2] - parts[1] + z[2] * (parts[3] - parts[2])))
    assert torch.allclose(quantise(x, x_max, nested(z)), expected, atol=1e-7)


def test_quantiser_gradients_are_straight_through() -> None:
    x = torch.tensor([0.31, -0.77, 1.9, -3.0], requires_grad=True)
    x_max = torch.tensor(1.5, requires_grad=True)
    gates = torch.tensor([0.9, 0.4], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out = quantise(x, x_max, gates)
    (out * weight).sum().backward()
    levels = [quantise(x, x_max, open_up_to(b)).detach() for b in (2, 4, 8)]
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0, 3.0, 0.0]  # 1.9 would come back, −3 go further out
    expected = torch.stack([(weight * (levels[k + 1] - levels[k])).sum() for k in range(2)])
    assert gates.grad is not None and torch.allclose(gates.grad, expected, atol=1e-6)
    # inside (x_q − x) / x_max; outside the quantised edge moves in proportion to the range, x_q / x_max
    inside = ((out - x) / x_max * weight)[:2].sum()
    outside = (out / x_max * weight)[2:].sum()
    assert x_max.grad is not None and float(x_max.grad) == pytest.approx(float((inside + outside).detach()), rel=1e-5)


def test_range_gradient_is_a_finite_difference_where_levels_stay(rel: float = 1e-3) -> None:
    """With x at the edge or beyond it the output is a fixed multiple of the range, and nothing is straight-through."""
    x = torch.tensor([5.0, -5.0, 7.0], dtype=torch.float64)
    x_max = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    gates = torch.tensor([1.0, 0.5], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (quantise(x, x_max, gates) * weight).sum().backward()
    up, down = (float((quantise(x, x_max.detach() + e, gates) * weight).sum()) for e in (1e-4, -1e-4))
    assert x_max.grad is not None and float(x_max.grad) == pytest.approx((up - down) / 2e-4, rel=rel)
