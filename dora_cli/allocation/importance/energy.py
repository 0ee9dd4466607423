"""The share of ‖ΔW‖² that a component is, as it stands: of principal components, what leaving it out costs exactly."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.importance.component_norm import component_norms
from dora_cli.allocation.table import UnitTable


@dataclass
class Energy(Importance):
    """(s · |c| · ‖b‖ · ‖a‖)² with the scale s, in all modules on one footing, with no smoothing.

    Where components are orthogonal, as principal ones are, it is σ², and the error of whatever is pruned is the sum of
    it (Eckart and Young). DoRA's score divides by the norm of the module's update, and is blind to how large that is.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    remembers: ClassVar[bool] = False

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        scores = torch.zeros(len(table))
        for group in table.groups():
            scale = torch.tensor([layer.scale for layer in group.layers])[:, None]
            norms, _ = component_norms(*group.factors(), group.gates())
            scores[group.index.cpu()] = (scale * norms.float().cpu()).square()
        return scores
