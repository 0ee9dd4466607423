"""Hard-concrete gates, and a quantiser whose bit width is gated (Bayesian Bits, van Baalen et al. 2020, 2005.07093).

Symbols: ``φ`` a gate's logit, ``z`` ∈ [0, 1] its sampled value, ``s_b`` the step of b-bit quantisation. Formulas and
constants: METHODS 6. Everything stays in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # β, γ, ζ: how soft a gate is, and how far it stretches beyond [0, 1]
SHIFT = -TEMPERATURE * math.log(-LOW / HIGH)  # P(z > 0) = sigmoid(φ + 1.5986)
THRESHOLD = math.log(0.66 / 0.34) - SHIFT  # a decided gate is open where P(z = 0) < 0.34: φ > −0.935
SWITCH_OFF = -2.0  # at or below, a bit gate is shut in training too, and every higher one with it
BITS = (2, 4, 8, 16, 32)
FINER = (5, 17, 257, 65537)  # s_2 / s_4, s_4 / s_8, …: odd, so that each grid holds the coarser one


def open_probability(logits: Tensor) -> Tensor:
    """P(z > 0) of each gate."""
    return torch.sigmoid(logits + SHIFT)


def sampled(logits: Tensor) -> Tensor:
    """z = clip(σ((ln u − ln(1 − u) + φ)/β)(ζ − γ) + γ, 0, 1), u ~ U(0, 1) from the global generator."""
    u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)  # at 0 and 1 the logarithms are infinite
    stretched = torch.sigmoid((torch.logit(u) + logits) / TEMPERATURE) * (HIGH - LOW) + LOW
    return stretched.clamp(0.0, 1.0)


def decided(logits: Tensor) -> Tensor:
    """1 for gates that are open without noise, else 0."""
    return (logits > THRESHOLD).to(logits.dtype)


def first_open(gates: Tensor) -> Tensor:
    """The same gates (…, r) with the first fixed at 1, whatever its logit: no gradient reaches it."""
    return torch.cat([torch.ones_like(gates[..., :1]), gates[..., 1:]], dim=-1)


def nested(gates: Tensor) -> Tensor:
    """Π_{j ≤ i} z_j along the last axis: a gate counts only together with all before it.

    In the log domain, because the backward pass of ``cumprod`` asks the device whether a factor is zero and waits. A
    factor of zero gets no gradient here; in ``sampled`` it would end at the clip anyway.
    """
    smooth = gates.clamp_min(1e-20).log().cumsum(-1).exp()
    return smooth * (gates > 0).cumprod(-1)  # exactly 0 behind a shut gate


def round_through(x: Tensor) -> Tensor:
    """x rounded, with the gradient of x."""
    return x + (x.round() - x).detach()


class _Clip(torch.autograd.Function):
    """x within [−edge, edge]. Outside, x has a gradient only where descent brings it back, and the edge has the rest.

    Without the way back, an entry that one large step has thrown out of the range would never train again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, edge: Tensor) -> Tensor:
        ctx.save_for_backward(x, edge)
        return torch.clamp(x, -edge, edge)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, edge = ctx.saved_tensors
        outside = x.abs() > edge
        of_x = gradient * (~outside | (gradient * x > 0))
        return of_x, (gradient * x.sign() * outside).sum()


def quantise(x: Tensor, x_max: Tensor, gates: Tensor) -> Tensor:
    """x on the grid of as many bits as gates are open, within [−x_max, x_max].

    x_q = x_2 + Π₁ ε_4 + Π₂ ε_8 + …, with x_2 = s_2⌊x/s_2⌉, s_2 = 2 x_max/3, ε_b = s_b⌊(x − what is quantised)/s_b⌉ and
    Π_k the nested gates. Rounding is straight-through: x_q has gradient 1 in x (outside the range: see ``_Clip``), ε_b
    in Π, and (x_q − x)/x_max in x_max, 1 in size where x is clipped. So the levels themselves need no graph.

    Args:
        x: any shape.
        x_max: () the range, above 0.
        gates: (n,) nested gates of 4, 8, … bits.

    Returns:
        The shape of x. With gates of 0 and 1, open up to b bits, |x_q − clip(x)| ≤ s_b/2.
    """
    edge = x_max * (1 - 1e-7)  # just inside, so that the edge never rounds up to a level that does not exist
    clipped: Tensor = _Clip.apply(x, edge)
    with torch.no_grad():
        step = x_max * 2 / 3
        coarse = step * (clipped / step).round()
        rest, levels = clipped - coarse, []
        for finer in FINER[: len(gates)]:
            step = step / finer
            levels.append(step * (rest / step).round())
            rest = rest - levels[-1]
        error = coarse - clipped
    for gate, level in zip(gates.unbind(), levels, strict=True):
        error = error + gate * level
    return clipped + error * (x_max / x_max.detach())


def effective_bits(gates: Tensor) -> Tensor:
    """Bit width 2^(1 + q_4 + q_4 q_8 + …) for nested gates (…, n) of 0 and 1."""
    return 2 ** (1 + gates.sum(-1))
