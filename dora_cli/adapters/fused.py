"""Frozen linear layers and their low-rank updates as one node of the graph, in as few passes over memory as can be.

y = x Wᵀ + bias + ((x ∘ m) Aᵀ) (B diag(f))ᵀ with m the dropout mask and f the factor of each component. Written out in
plain operations this copies y and the gradient of x once more each. Here the thin product comes first and takes the
bias along, and the base's own product is accumulated onto it, so that the update costs no pass over y or x's gradient
of its own. Between forward and backward only the adapter's input and what is r wide are kept.

Layers that read the same input (``siblings.py``) are one node: their right factors are one matrix, which reads the
input once in each direction, and they add to one gradient of x.

Thin matrices are laid out with ``WIDTH`` columns or a multiple of it, and as the products of both directions read them
best: a CPU's library multiplies by 16 columns faster than by 7 (``scripts/bench/step.py``), and modules may have any
rank after pruning.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Factor = Tensor | float
WIDTH = 16
PER_LAYER = 5  # a, b, factor, weight, bias in the node's arguments


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
    plain = type(weight) is nn.Parameter or _is_fake(weight)
    if not plain or weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if torch.compiler.is_compiling() or "forward" in base.__dict__:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return weight.is_floating_point()
    return x.dtype == weight.dtype == a.dtype


def _is_fake(weight: Tensor | None) -> bool:
    """Whether it stands for a parameter in a plan; such a one has no type of its own."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(weight, FakeTensor)


class LowRankLinear(NamedTuple):
    """A frozen linear layer and its low-rank update.

    Attributes:
        weight, bias: of the base, (d_out, d_in) and (d_out,) or None; they get no gradient.
        a, b: factors, (r, d_in) and (d_out, r).
        factor: what each component is multiplied by, (r,), or one number for all.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    factor: Factor


def low_rank_linears(
    x: Tensor, layers: Sequence[LowRankLinear], dropped: Tensor | None = None, mask: Tensor | None = None
) -> list[Tensor]:
    """The outputs (…, d_out) of layers that read the same input.

    Args:
        x: input, (…, d_in).
        layers: at least one.
        dropped: the adapters' input x ∘ m, without graph; None where it is x itself.
        mask: m, as ``dropped`` was made with it.
    """
    dtype = compute_type(x)
    flat: list[Any] = []
    for weight, bias, a, b, factor in layers:
        factor = _cast(factor, dtype) if isinstance(factor, Tensor) else factor
        flat += (_cast(a, dtype), _cast(b, dtype), factor, weight, bias)
    outs = _LowRankLinears.apply(_cast(x, dtype), dropped, mask, *flat)
    # Not in the node: autograd lets nobody write into a view made there.
    return list(outs) if x.dim() == 2 else [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, mask: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        inputs = rows if dropped is None else dropped.reshape(rows.shape)
        layers = [flat[i : i + PER_LAYER] for i in range(0, len(flat), PER_LAYER)]
        rights = [_widened(a, 0) for a, *_ in layers]  # (width, d_in) each
        right = rights[0] if len(layers) == 1 else torch.cat(rights)
        hidden = inputs.mm(right.t())  # (n, all widths)
        ys, lefts, gated, start = [], [], [], 0
        for (_, b, factor, weight, bias), own in zip(layers, rights, strict=True):
            left = _widened(b * factor, 1)  # (d_out, width)
            thin = hidden[:, start : start + len(own)]
            y = thin.mm(left.t()) if bias is None else torch.addmm(_cast(bias, x.dtype), thin, left.t())
            ys.append(y.addmm_(rows, _cast(weight, x.dtype).t()))  # (n, d_out)
            lefts.append(left)
            gated += [b, factor] if isinstance(factor, Tensor) else [None, None]
            start += len(own)
        ctx.save_for_backward(inputs, hidden, right, *lefts, *flat[3::PER_LAYER], *gated)
        ctx.factors = [factor if isinstance(factor, float) else None for factor in flat[2::PER_LAYER]]
        ctx.mask, ctx.shape, ctx.ranks = mask, x.shape, [len(a) for a in flat[::PER_LAYER]]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, hidden, right, *saved = ctx.saved_tensors
        k, (need_x, _, _, *needs) = len(grads), ctx.needs_input_grad
        lefts, weights, gated = saved[:k], saved[k : 2 * k], saved[2 * k :]
        back = torch.empty_like(hidden) if k > 1 else grads[0].mm(lefts[0])  # (n, all widths)
        found: list[Tensor | None] = [None] * (PER_LAYER * k)
        start = 0
        for i, (grad, left, r) in enumerate(zip(grads, lefts, ctx.ranks, strict=True)):
            own, at = slice(start, start + left.shape[1]), PER_LAYER * i
            start = own.stop
            if k > 1:
                torch.mm(grad, left, out=back[:, own])
            if needs[at + 1] or needs[at + 2]:
                b, factor = gated[2 * i : 2 * i + 2]
                product = grad.t().mm(hidden[:, own])[:, :r]  # (d_out, r), of B diag(f)
                found[at + 1] = product * (ctx.factors[i] if factor is None else factor)
                found[at + 2] = (product * b).sum(0) if needs[at + 2] else None
        if any(needs[::PER_LAYER]):
            rows = inputs.t().mm(back).t()  # (all widths, d_in)
            start = 0
            for at, left, r in zip(range(0, len(found), PER_LAYER), lefts, ctx.ranks, strict=True):
                found[at] = rows[start : start + r]
                start += left.shape[1]
        if not need_x:
            return None, None, None, *found
        grad_x = back.mm(right)
        if ctx.mask is not None:
            grad_x.mul_(ctx.mask.reshape(grad_x.shape))
        for grad, weight in zip(grads, weights, strict=True):
            grad_x.addmm_(grad, _cast(weight, grad.dtype))
        return grad_x.view(ctx.shape), None, None, *found


def _widened(thin: Tensor, dim: int) -> Tensor:
    """``thin`` with zeros after it along ``dim``, up to a multiple of ``WIDTH``."""
    missing = -thin.shape[dim] % WIDTH
    return torch.constant_pad_nd(thin, (0, missing) if dim else (0, 0, 0, missing)) if missing else thin


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
