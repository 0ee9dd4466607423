"""Turning the components of an update into its principal ones, while it trains.

With B = Q_B R_B, Aᵀ = Q_A R_A and R_B R_Aᵀ = U S Vᵀ the update B A is Q_B U S · Vᵀ Q_Aᵀ. The rows of the new A are
orthogonal and have one length, that of the old rows (root mean square): only B says how large a component is, as in
LoRA, and A's rate means what it meant. So A' = M A and B' = B M⁻¹ with M = ρ Vᵀ R_A⁻ᵀ, (r, r), and the update stays.

Adam's moments turn with them. Gradients of A' are M⁻ᵀ times those of A, gradients of B' those of B times Mᵀ, so first
moments follow exactly; second moments as if gradients of different components were uncorrelated.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dora_cli.adapters.base import LowRankLayer

MOST_SKEWED = 1e-4  # of R_A: below this the rows of A are dependent in float32, and a module is left as it is


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
    groups: Sequence[Sequence[LowRankLayer]],
    optimizer: Optimizer | None,
    agree: Callable[[Tensor], Tensor] = lambda values: values,
) -> None:
    """Turn every layer's components into its principal ones, in place: parameters, and moments where there are any.

    Args:
        groups: layers of plain A and B; those of a group have one shape.
        agree: of several processes, gives each the numbers of one of them, so that all turn alike to the bit.
    """
    with torch.no_grad():
        turns = [
            principal_turn(*(torch.stack([getattr(layer, n).detach().cpu() for layer in group]) for n in "ab"))
            for group in groups
        ]
        if not turns:
            return
        flat = agree(torch.cat([turn.flatten() for turn in turns]))
        parts = flat.split([turn.numel() for turn in turns])
        for group, turn, part in zip(groups, turns, parts, strict=True):
            for layer, m in zip(group, part.view_as(turn), strict=True):
                _apply(layer, m, optimizer)


def _apply(layer: LowRankLayer, m: Tensor, optimizer: Optimizer | None) -> None:
    inverse = torch.linalg.inv(m)
    for parameter, turn, of_gradients, left in ((layer.a, m, inverse.mT, True), (layer.b, inverse, m.mT, False)):
        _times(parameter.detach(), turn, left)
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        if "exp_avg" in state:
            _times(state["exp_avg"], of_gradients, left)
            _times(state["exp_avg_sq"], of_gradients.square(), left)


def _times(tensor: Tensor, turn: Tensor, left: bool) -> None:
    """``turn`` (r, r) times an A-like tensor (r, d), or a B-like one (d, r) times ``turn``, in place, in float64."""
    values = tensor.cpu().double()
    tensor.copy_(turn @ values if left else values @ turn)
