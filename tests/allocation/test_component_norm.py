"""DoRA's scores: the hand-checked fixture, dense float64, and the properties of METHODS 2.13."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dora_cli.allocation.importance.component_norm import ComponentNorm, component_norms
from dora_cli.allocation.table import UnitTable


def dense_scores(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The definition (Eq. 7), every rank-1 matrix formed, in float64."""
    a, b, c = a.double(), b.double(), c.double()
    pieces = [c[i] * torch.outer(b[:, i], a[i]) for i in range(len(c))]
    total = torch.stack(pieces).sum(0).norm()
    return torch.stack([piece.norm() for piece in pieces]) / (total + 1e-8)


def scores_of(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    norms, total = component_norms(a[None], b[None], c[None])
    return (norms / (total + 1e-8)[:, None])[0]


def test_the_hand_checked_fixture() -> None:
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    a = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    c = torch.tensor([2.0, -1.0])
    norms, total = component_norms(a[None], b[None], c[None])
    assert norms[0].tolist() == pytest.approx([10.0, 2.0])
    assert float(total[0]) ** 2 == pytest.approx(104.0)
    assert scores_of(a, b, c).tolist() == pytest.approx([0.98058, 0.19612], abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(r=st.integers(1, 12), d_in=st.integers(1, 40), d_out=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_closed_form_equals_the_dense_definition(r: int, d_in: int, d_out: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)
    c = torch.randn(r, generator=g)
    closed = scores_of(a.double(), b.double(), c.double())
    dense = dense_scores(a, b, c)
    # The Gram form squares: where components cancel to 1/q of their sum, its relative error is about r·2e-16·q².
    assume(float(dense.sum()) < 1e3)
    assert torch.allclose(closed, dense, rtol=1e-6, atol=1e-9)
    # ε = 1e-8 shrinks the scores by its share of ‖ΔW‖, which shows where the update itself is tiny.
    assume(float((b.double() * c @ a.double()).norm()) > 0.1)
    # The triangle inequality, and no dependence on the size of the update.
    assert float(closed.sum()) >= 1 - 1e-6
    assert torch.allclose(scores_of(a.double(), b.double(), 7 * c.double()), closed, rtol=1e-6)


def test_float32_scores_are_within_1e_minus_6_of_float64_at_real_sizes() -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(12, 768, generator=g) * 0.05, torch.randn(3072, 12, generator=g) * 0.4
    c = torch.randn(12, generator=g) * 1e-3
    assert torch.allclose(scores_of(a, b, c).double(), dense_scores(a, b, c), rtol=1e-6, atol=1e-6)


def test_smoothing_starts_at_zero_and_has_no_bias_correction(stack) -> None:  # type: ignore[no-untyped-def]
    _, layers = stack(n=2, rank=3)
    table = UnitTable(layers)
    importance = ComponentNorm(beta=0.9)
    importance.attach(table)
    expected = torch.zeros(6, dtype=torch.float64)
    for step in range(1, 4):
        importance.update(table, step)
        now = torch.cat([dense_scores(layer.a, layer.b, layer.c) for layer in layers.values()]).detach()
        expected = 0.9 * expected + 0.1 * now
        with torch.no_grad():
            for layer in layers.values():
                layer.c.mul_(torch.rand(3))
    assert torch.allclose(importance.scores(table, None).double(), expected, rtol=1e-5)


def test_an_empty_update_scores_zero_not_nan(stack) -> None:  # type: ignore[no-untyped-def]
    _, layers = stack(n=2, rank=3, shake=False)  # c = 0 everywhere
    table = UnitTable(layers)
    importance = ComponentNorm()
    importance.attach(table)
    importance.update(table, 1)
    assert importance.scores(table, None).tolist() == [0.0] * 6
