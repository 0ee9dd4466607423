"""A frozen linear layer and its low-rank update as one node of the graph, in as few passes over memory as can be.

y = x Wᵀ + bias + ((x ∘ m) Aᵀ) (B diag(f))ᵀ with m the dropout mask and f the factor of each component. Written out in
plain operations this copies y and the gradient of x once more each. Here the thin product comes first and takes the
bias along, and the base's own product is accumulated onto it, so that the update costs no pass over y or x's gradient
of its own. Between forward and backward only the adapter's input and what is r wide are kept.

Thin matrices are laid out with ``WIDTH`` columns or a multiple of it, and as the products of both directions read them
best: a CPU's library multiplies by 16 columns faster than by 7 (``scripts/bench/step.py``), and modules may have any
rank after pruning.
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
    kind = type(base)
    if kind is not nn.Linear and not (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")  # without nn.Module's slow lookup
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if torch.compiler.is_compiling() or "forward" in base.__dict__:
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
    if isinstance(factor, Tensor):
        factor = _cast(factor, dtype)
    shape = x.shape
    out: Tensor = _LowRankLinear.apply(
        _cast(x, dtype), _cast(a, dtype), _cast(b, dtype), factor, weight, bias, dropped, mask
    )
    # Not in the node: autograd lets nobody write into a view made there.
    return out if len(shape) == 2 else out.view(*shape[:-1], out.shape[1])


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
        rows = x.reshape(-1, x.shape[-1])
        inputs = rows if dropped is None else dropped.reshape(rows.shape)
        right, left = _widened(a, 0), _widened(b * factor, 1)  # (width, d_in), (d_out, width)
        hidden = inputs.mm(right.t())  # (n, width)
        y = hidden.mm(left.t()) if bias is None else torch.addmm(_cast(bias, x.dtype), hidden, left.t())
        y.addmm_(rows, _cast(weight, x.dtype).t())
        ctx.save_for_backward(inputs, hidden, right, left, weight, *((b, factor) if isinstance(factor, Tensor) else ()))
        ctx.factor = None if isinstance(factor, Tensor) else factor
        ctx.mask, ctx.shape, ctx.r = mask, x.shape, a.shape[0]
        return y  # (n, d_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, hidden, right, left, weight, *gated = ctx.saved_tensors  # gated: b and its factors
        need_x, need_a, need_b, need_factor = ctx.needs_input_grad[:4]
        grad_x = grad_a = grad_b = grad_factor = None
        if need_b or need_factor:
            product = grad.t().mm(hidden)[:, : ctx.r]  # (d_out, r), of B diag(f)
            grad_factor = (product * gated[0]).sum(0) if need_factor else None
            grad_b = product * (gated[1] if gated else ctx.factor) if need_b else None
        if need_a or need_x:
            back = grad.mm(left)  # (n, width)
        if need_a:
            grad_a = inputs.t().mm(back).t()[: ctx.r]
        if need_x:
            grad_x = back.mm(right)
            if ctx.mask is not None:
                grad_x.mul_(ctx.mask.reshape(grad_x.shape))
            grad_x = grad_x.addmm_(grad, _cast(weight, grad.dtype)).view(ctx.shape)
        return grad_x, grad_a, grad_b, grad_factor, None, None, None, None


def _widened(thin: Tensor, dim: int) -> Tensor:
    """``thin`` with zeros after it along ``dim``, up to a multiple of ``WIDTH``."""
    missing = -thin.shape[dim] % WIDTH
    return torch.constant_pad_nd(thin, (0, missing) if dim else (0, 0, 0, missing)) if missing else thin


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
