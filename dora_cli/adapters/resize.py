"""The one way in which parameters shrink and grow while they train.

New parameters are made from rows of the old ones, and the optimizer's moments move with them. Fused AdamW steps on
stale shapes without an error, so every state is checked before it is used again.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dora_cli.adapters.base import AdapterLayer


def resize(layer: AdapterLayer, keep: Tensor, n_new: int = 0, optimizer: Optimizer | None = None) -> None:
    """Keep the units at positions ``keep`` and append ``n_new`` fresh ones, in parameters, gradients and moments.

    Args:
        layer: an adapted layer with ``unit_axes``.
        keep: (k,) int64 positions along the unit axis, in the order wanted.
        n_new: units to append; they leave the function as it is and start with zero moments.
        optimizer: the optimizer that holds the layer's parameters, if any.
    """
    fresh = layer.fresh(n_new) if n_new else {}
    for name, axis in layer.unit_axes.items():
        old: nn.Parameter = getattr(layer, name)
        new = nn.Parameter(_rows(old.detach(), keep, axis, fresh.get(name)), requires_grad=old.requires_grad)
        if old.grad is not None:
            new.grad = _rows(old.grad, keep, axis, _zeros(fresh, name))
        setattr(layer, name, new)
        if optimizer is not None:
            _move_state(optimizer, old, new, keep, axis, _zeros(fresh, name))


def discard(parameters: list[nn.Parameter], optimizer: Optimizer) -> None:
    """Take parameters out of the optimizer for good: no decay, no moments, no gradient (``zero_grad`` forgets them)."""
    gone = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
        parameter.grad = None


def check_state(optimizer: Optimizer) -> None:
    """Raise RuntimeError where a state is neither a scalar nor a number for each of its parameter's.

    Packed numbers (8-bit moments) may come in a tensor type of their own, of the parameter's shape but without rows.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                if value.shape != parameter.shape or type(value) is not type(parameter.data):
                    raise RuntimeError(
                        f"optimizer state '{key}' is a {type(value).__name__} of shape {tuple(value.shape)}, "
                        f"its parameter has shape {tuple(parameter.shape)}"
                    )


def _rows(old: Tensor, keep: Tensor, axis: int, fresh: Tensor | None) -> Tensor:
    kept = old.index_select(axis, keep.to(old.device))
    return (kept if fresh is None else torch.cat([kept, fresh.to(kept)], dim=axis)).contiguous()


def _zeros(fresh: dict[str, Tensor], name: str) -> Tensor | None:
    return torch.zeros_like(fresh[name]) if name in fresh else None


def _move_state(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, keep: Tensor, axis: int, zeros: Tensor | None
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is not None:
        # Scalars (the step count) belong to the tensor as a whole and stay.
        optimizer.state[new] = {
            key: _rows(value, keep, axis, zeros) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }
