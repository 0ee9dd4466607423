"""Turning the components of an update into its principal ones, while it trains.

With B = Q_B R_B, Aᵀ = Q_A R_A and R_B R_Aᵀ = U S Vᵀ the update B A is Q_B U S · Vᵀ Q_Aᵀ. The rows of the new A are
orthogonal and have one length, that of the old rows (root mean square): only B says how large a component is, as in
LoRA, and A's rate means what it meant. So A' = M A and B' = B M⁻¹ with M = ρ Vᵀ R_A⁻ᵀ, (r, r), and the update stays.

Adam's moments turn with them. Gradients of A' are M⁻ᵀ times those of A, gradients of B' those of B times Mᵀ, so first
moments follow exactly; second moments as if gradients of different components were uncorrelated.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from dora_cli.adapters.base import LowRankLayer
from dora_cli.adapters.copies import unit_tensors

MOST_SKEWED = 1e-4  # of R_A: below this the rows of A are dependent in float32, and a module is left as it is
# What optimizers keep for each number: running means of gradients, and of their squares.
FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")


def principal_turn(a: Tensor, b: Tensor) -> Tensor:
    """M of modules of one shape, so that M A and B M⁻¹ are the principal components, the largest first.

    Args:
        a: shape ``(m, r, d_in)``.
        b: shape ``(m, d_out, r)``.

    Returns:
        Shape ``(m, r, r)``, float64; the identity where B is zero or the rows of A are dependent.
    """
    a, b = a.double(), b.double()
    r_a, r_b = (torch.linalg.qr(x, mode="r").R for x in (a.mT, b))
    if r_a.shape[1] < r_a.shape[2]:  # more components than d_in
        return torch.eye(a.shape[1], dtype=a.dtype, device=a.device).expand(len(a), -1, -1).clone()
    sizes = torch.linalg.svdvals(r_a)
    usable = (sizes[:, -1] > MOST_SKEWED * sizes[:, 0]) & (b.flatten(1).norm(dim=1) > 0)
    eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    r_a = torch.where(usable[:, None, None], r_a, eye)
    _, _, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=True)
    length = a.square().sum((1, 2)).div(a.shape[1]).sqrt()
    turn = length[:, None, None] * torch.linalg.solve(r_a, vt.mT).mT  # Vᵀ R_A⁻ᵀ
    return torch.where(usable[:, None, None], turn, eye)


def turn_to_principal(
    units: Iterable[tuple[LowRankLayer, Tensor]],
    optimizer: Optimizer | None,
    agree: Callable[[Tensor], Tensor] = lambda values: values,
) -> None:
    """Turn components into the principal ones of their sum, in place: parameters, and moments where there are any.

    Args:
        units: layers of plain A and B, and the positions of the components to turn, in ascending order. The largest
            comes first among these, and no other changes: one that is gone for good would take what it is given along.
        agree: of several processes, gives each the numbers of one of them, so that all turn alike to the bit.
    """
    groups: dict[tuple[int, int, int], list[tuple[LowRankLayer, Tensor]]] = {}
    for layer, positions in units:
        groups.setdefault((layer.d_out, layer.d_in, len(positions)), []).append((layer, positions))
    if not groups:
        return
    with torch.no_grad():
        turns = [
            principal_turn(
                torch.stack([layer.a.index_select(0, positions).cpu() for layer, positions in group]),
                torch.stack([layer.b.index_select(1, positions).cpu() for layer, positions in group]),
            )
            for group in groups.values()
        ]
        flat = agree(torch.cat([turn.flatten() for turn in turns]))
        parts = flat.split([turn.numel() for turn in turns])
        for group, turn, part in zip(groups.values(), turns, parts, strict=True):
            for (layer, positions), m in zip(group, part.view_as(turn), strict=True):
                _apply(layer, positions, m, optimizer)


def _apply(layer: LowRankLayer, positions: Tensor, m: Tensor, optimizer: Optimizer | None) -> None:
    inverse = torch.linalg.inv(m)
    of_values, of_gradients = {"a": m, "b": inverse}, {"a": inverse.mT, "b": m.mT}
    for name, moment, tensor, axis in unit_tensors(layer, optimizer):
        if not moment:
            _times(tensor, positions, of_values[name], axis)
        elif moment in FIRST:
            _times(tensor, positions, of_gradients[name], axis)
        elif moment in SECOND:
            _times(tensor, positions, of_gradients[name].square(), axis)


def _times(tensor: Tensor, positions: Tensor, turn: Tensor, axis: int) -> None:
    """``turn`` (k, k) times k rows of an A-like tensor (r, d), or k columns of a B-like one (d, r) times ``turn``.

    In place, and in float64 on the CPU: not every device has that.
    """
    values = tensor.index_select(axis, positions).cpu().double()
    turned = turn @ values if axis == 0 else values @ turn
    tensor.index_copy_(axis, positions, turned.to(tensor.dtype).to(tensor.device))
