"""A frozen linear layer and its low-rank update as one node of the graph, in as few passes over memory as can be.

y = x Wᵀ + bias + ((x ∘ m) Aᵀ ∘ f) Bᵀ with m the dropout mask and f the factor of each component. Written out in plain
operations this copies y and the gradient of x once more each. Here the thin products come first, take the bias along,
and the base's own product is accumulated onto them, so that the update costs no pass over y or x's gradient of its own.
Between forward and backward only the adapter's input and the r-wide hidden activations are kept.

Thin matrices are laid out with ``WIDTH`` columns or a multiple of it: a CPU's library multiplies by 16 columns faster
than by 7 (``scripts/bench/step.py``), and modules may have any rank after pruning.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Factor = Tensor | float
WIDTH = 16


def compute_type(x: Tensor) -> torch.dtype:
    """What a linear layer computes in for this input: autocast's type where it is on, else the input's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def can_fuse(base: nn.Module, x: Tensor, a: Tensor) -> bool:
    """Whether ``base`` is a plain frozen linear layer (or ``Conv1D``) that nobody listens to, and the types agree.

    A compiler sees more than one node at a time, and is left the plain operations.
    """
    conv1d = type(base).__name__ == "Conv1D" and type(base).__module__.startswith("transformers.")
    if torch.compiler.is_compiling() or not (type(base) is nn.Linear or conv1d):
        return False
    weight, bias = base.weight, base.bias
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if any((base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)):
        return False
    if "forward" in base.__dict__:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return weight.is_floating_point()
    return x.dtype == weight.dtype == a.dtype


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    factor: Factor,
    dropped: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The adapted layer's output, (…, d_out).

    Args:
        x: input, (…, d_in).
        weight, bias: of the frozen base, (d_out, d_in) and (d_out,) or None; they get no gradient.
        a, b: factors, (r, d_in) and (d_out, r).
        factor: what each component is multiplied by, (r,), or one number for all.
        dropped: the adapter's input x ∘ m, without graph; None where it is x itself.
        mask: m, as ``dropped`` was made with it.
    """
    dtype = compute_type(x)
    casts = [t.to(dtype) if isinstance(t, Tensor) else t for t in (x, a, b, factor)]
    out: Tensor = _LowRankLinear.apply(*casts, weight, bias, dropped, mask)
    return out.view(*x.shape[:-1], out.shape[-1])  # not in the node: autograd lets nobody write into a view made there


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        factor: Factor,
        weight: Tensor,
        bias: Tensor | None,
        dropped: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        r, d_out = a.shape[0], weight.shape[0]
        rows = x.reshape(-1, x.shape[-1])  # (n, d_in)
        inputs = rows if dropped is None else dropped.reshape(rows.shape)
        left = b.new_empty(r + (bias is not None), d_out)
        hidden = inputs @ _widened(a.t(), len(left))  # (n, width), zeros beyond r
        torch.mul(b.t(), _column(factor), out=left[:r])
        if bias is not None:  # one more component, always 1
            hidden[:, r] = 1
            left[r] = bias
        y = hidden[:, : len(left)] @ left
        y.addmm_(rows, weight.t().to(x.dtype))
        ctx.save_for_backward(inputs, a, b, hidden, weight, *([factor] if isinstance(factor, Tensor) else []))
        ctx.factor, ctx.mask, ctx.shape = factor, mask, x.shape
        return y  # (n, d_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, a, b, hidden, weight, *gates = ctx.saved_tensors
        factor = gates[0] if gates else ctx.factor
        need_x, need_a, need_b, need_factor = ctx.needs_input_grad[:4]
        r = a.shape[0]
        g = grad  # (n, d_out)
        grad_x = grad_a = grad_b = grad_factor = None
        if need_b or need_factor:
            product = (hidden.t().contiguous() @ g)[:r]  # (r, d_out), of B diag(f)
            grad_factor = (product * b.t()).sum(1) if need_factor else None
            grad_b = product.mul_(_column(factor)).t().contiguous() if need_b else None
        if need_a or need_x:
            back = g @ _widened(b * factor, r)  # (n, width)
        if need_a:
            grad_a = (back.t().contiguous() @ inputs)[:r]
        if need_x:
            grad_x = back[:, :r] @ a
            if ctx.mask is not None:
                grad_x.mul_(ctx.mask.reshape(grad_x.shape))
            grad_x = grad_x.addmm_(g, weight.to(g.dtype)).view(ctx.shape)
        return grad_x, grad_a, grad_b, grad_factor, None, None, None, None


def _widened(thin: Tensor, columns: int) -> Tensor:
    """(d, r) → (d, width), zeros beyond r, with a width that has room for ``columns``."""
    wide = thin.new_zeros(thin.shape[0], -(-columns // WIDTH) * WIDTH)
    wide[:, : thin.shape[1]] = thin
    return wide


def _column(factor: Factor) -> Factor:
    return factor[:, None] if isinstance(factor, Tensor) else factor
