"""AdaLoRA's orthogonality penalty on P (d_out, r) and Q (r, d_in)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dora_cli.allocation.regularizers.base import Regularizer, add_to_gradients
from dora_cli.allocation.table import UnitTable


@dataclass
class Orthogonal(Regularizer):
    """Both codes: the mean over the 2L matrices of ‖PᵀP − I‖_F, un-squared; the paper: the sum of the squares
    (METHODS 3). Gradients 2P(PᵀP − I)/‖·‖_F and 4P(PᵀP − I); that of the norm is 0 where P is orthonormal to rounding.
    """

    weight: float = field(default=0.1, metadata={"help": "γ, what R is multiplied by in the loss", "low": 0.0})
    squared: bool = field(default=False, metadata={"help": "the paper's sum of squares, not the codes' mean norm"})

    def value(self, table: UnitTable) -> float:
        norms = [gap.flatten(1).norm(dim=1) for *_, gap in self._gaps(table)]
        if not norms:
            return 0.0
        flat = torch.cat(norms)
        return float(flat.square().sum() if self.squared else flat.mean())

    def after_backward(self, table: UnitTable) -> None:
        gaps = list(self._gaps(table))
        n_matrices = sum(len(gap) for *_, gap in gaps)
        for parameters, name, values, gap in gaps:
            scale = 4.0 * self.weight if self.squared else 2.0 * self.weight / n_matrices
            if not self.squared:
                norm = torch.linalg.vector_norm(gap, dim=(1, 2), keepdim=True)
                # At orthonormal the norm has a kink, and what is left of the gap is rounding: as a direction of length
                # one it would be all the gradient that P and Q have while λ = 0, and Adam's first step follow it.
                noise = torch.finfo(gap.dtype).eps * 2 * math.sqrt(values[0].numel())
                gap = torch.where(norm <= noise, 0.0, gap / norm)  # what is no number stays none
            # The gap is symmetric: Q's gradient in Q's own layout is gap · Q.
            add_to_gradients(parameters, values @ gap if name == "b" else gap @ values, scale)

    def _gaps(self, table: UnitTable) -> Iterator[tuple[Sequence[nn.Parameter], str, Tensor, Tensor]]:
        """(parameters, their name, P (m, d_out, r) or Q (m, r, d_in), PᵀP − I or QQᵀ − I (m, r, r)), by shape."""
        for group in table.groups():
            for name in ("b", "a"):
                values = group.stack(name)
                eye = torch.eye(group.index.shape[1], device=values.device, dtype=values.dtype)
                if group.kept is not None:  # a dropped unit is gone, also while its rows still wait to be removed
                    values = values * (group.kept[:, None, :] if name == "b" else group.kept[:, :, None])
                    eye = eye * group.kept[:, :, None]
                gap = (values.mT @ values if name == "b" else values @ values.mT) - eye
                yield group.parameters(name), name, values, gap
