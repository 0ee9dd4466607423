"""Shrinking and growing in mid-run: values, gradients and moments move together, bit for bit."""

from typing import Any

import pytest
import torch
from torch import nn

from dora_cli.adapters import base
from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.adapters.resize import check_state, discard, resize

STEPS, SHRINK_AT, WIDTH, RANK = 60, 25, 48, 32
# Half of the ranks, scattered. Every tensor keeps a multiple of 16 numbers: fused AdamW rounds the last few of a
# tensor, which fill no vector register, another way (22 of 300 gates of size 4 differed from the same gates in a tensor
# of size 8 after 20 steps). Sums over a batch are rounded by the shape too, so a step sees one row.
KEEP = torch.tensor([0, 2, 3, 6, 7, 8, 11, 13, 15, 16, 19, 22, 23, 26, 30, 31])


def rank_by_rank(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A linear layer whose rounding does not depend on how many ranks there are.

    A BLAS picks its blocking, and so its order of summation, by the shape: on the CPU this was written on, 162 of 209
    products with some rows taken out differ in the last bits. Here every product is formed alone and summed in order.
    """
    if weight.shape[0] <= RANK:  # x Aᵀ: each rank's dot product by itself
        return torch.stack([(x * row).sum(-1) for row in weight], dim=-1)
    out = torch.zeros(*x.shape[:-1], weight.shape[0])
    for i in range(weight.shape[1]):
        out = out + x[..., i : i + 1] * weight[:, i]
    return out


class OneByOne:
    """Stands in for ``torch.nn`` in the adapters' module: only ``functional.linear`` is another."""

    class functional:
        linear = staticmethod(rank_by_rank)
        dropout = staticmethod(nn.functional.dropout)


def trajectory(shrink: bool) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Train three adapted layers; at SHRINK_AT half of each one's units die: rebuilt without them, or masked."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
    )
    model.requires_grad_(False)
    layers = inject(model, ["0", "2", "4"], Components(), [RANK] * 3)
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=3e-3, weight_decay=0.01), fused=True)
    g = torch.Generator().manual_seed(1)
    xs, ys = torch.randn(STEPS, 1, WIDTH, generator=g), torch.randn(STEPS, 1, WIDTH, generator=g)
    dead = torch.tensor([i for i in range(RANK) if i not in KEEP])
    losses, norms = [], []
    for t in range(STEPS):
        loss = (model(xs[t]) - ys[t]).square().mean()
        loss.backward()
        if t >= SHRINK_AT and not shrink:
            for layer in layers.values():
                layer.mute_gradient(dead)
        norms.append(sum(float(p.grad.norm()) for la in layers.values() for p in la.adapter_parameters().values()))
        optimizer.step()
        if t == SHRINK_AT - 1:
            for layer in layers.values():
                layer.silence(dead)
                if shrink:
                    resize(layer, KEEP, 0, optimizer)
            check_state(optimizer)
        elif t >= SHRINK_AT and not shrink:
            for layer in layers.values():
                layer.silence(dead)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    out = {}
    for name, layer in layers.items():
        for key, parameter in layer.adapter_parameters().items():
            axis = layer.unit_axes[key]
            out[f"{name}.{key}"] = parameter.detach() if shrink else parameter.detach().index_select(axis, KEEP)
    return out, losses, norms


def test_survivors_go_on_bit_for_bit_as_in_a_masked_run_under_fused_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "can_fuse", lambda *_: False)  # the plain operations, of which each can be replaced
    monkeypatch.setattr(base, "nn", _nn_with(OneByOne))
    masked, masked_losses, masked_norms = trajectory(shrink=False)
    shrunk, shrunk_losses, _ = trajectory(shrink=True)
    assert masked_losses == shrunk_losses
    assert len(set(masked_losses)) == STEPS
    for name, values in masked.items():
        assert torch.equal(values, shrunk[name]), name
    assert min(masked_norms) > 0


def test_with_blas_the_same_to_rounding() -> None:
    masked, masked_losses, _ = trajectory(shrink=False)
    shrunk, shrunk_losses, _ = trajectory(shrink=True)
    assert shrunk_losses == pytest.approx(masked_losses, rel=1e-5)
    for name, values in masked.items():
        assert torch.allclose(values, shrunk[name], atol=2e-5), name


def test_state_that_did_not_follow_its_parameter_is_caught() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    layers = inject(model, ["0"], Components(), [3])
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=1e-3, weight_decay=0.0), fused=True)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    check_state(optimizer)
    layer: Any = layers["0"]
    state = optimizer.state[layer.a]
    state["exp_avg"] = state["exp_avg"][:2]
    with pytest.raises(RuntimeError, match="exp_avg"):
        check_state(optimizer)


def test_gradients_follow_and_growth_appends_zeros() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    layer: Any = inject(model, ["0"], Components(), [3])["0"]
    optimizer = torch.optim.AdamW(parameter_groups({"0": layer}, lr=1e-3, weight_decay=0.0))
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    c_grad, moment = layer.c.grad.clone(), optimizer.state[layer.b]["exp_avg_sq"].clone()
    resize(layer, torch.tensor([2, 0]), 2, optimizer)
    assert layer.c.grad.tolist() == [c_grad[2].item(), c_grad[0].item(), 0.0, 0.0]
    moved = optimizer.state[layer.b]["exp_avg_sq"]
    assert torch.equal(moved[:, :2], moment[:, [2, 0]])
    assert not bool(moved[:, 2:].any())
    assert moved.shape == layer.b.shape == (6, 4)
    check_state(optimizer)


def test_what_leaves_the_optimizer_keeps_no_gradient() -> None:
    """Nobody would clear it any more: an empty one counted in the norm, and changed how its sum is rounded."""
    model = nn.Sequential(nn.Linear(8, 8))
    layer = inject(model, ["0"], Components(), [2])["0"]
    optimizer = torch.optim.AdamW(parameter_groups({"0": layer}, lr=1e-2, weight_decay=0.0), fused=True)
    model(torch.ones(1, 8)).sum().backward()
    resize(layer, torch.empty(0, dtype=torch.long), 0, optimizer)
    discard(list(layer.adapter_parameters().values()), optimizer)
    optimizer.zero_grad()
    assert [p.grad for p in layer.adapter_parameters().values()] == [None, None, None]


def _nn_with(replacement: type) -> Any:
    class Module:
        functional = replacement.functional  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> Any:
            return getattr(nn, name)

    return Module()
