"""AdaLoRA's importance (Zhang et al.): smoothed sensitivity times its smoothed uncertainty, per element."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.table import UnitTable


@dataclass
class Sensitivity(Importance):
    """I = |w·∂L/∂w|; Ī ← β₁Ī + (1−β₁)I; Ū ← β₂Ū + (1−β₂)|I − Ī| with the new Ī.

    A component's score is the sum, over its gate, column and row, of the mean of Ī·Ū (METHODS 3). Gradients are those
    of the total loss of the step just taken.
    """

    beta: float = field(default=0.85, metadata={"help": "smoothing of the sensitivity", "low": 0.0, "below": 1.0})
    beta_uncertainty: float = field(
        default=0.85, metadata={"help": "smoothing of the uncertainty", "low": 0.0, "below": 1.0}
    )

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def attach(self, table: UnitTable) -> None:
        self._table = table
        # (module, parameter name) → smoothed sensitivity and uncertainty, in the parameter's shape
        self.mean: dict[tuple[int, str], Tensor] = {}
        self.spread: dict[tuple[int, str], Tensor] = {}
        for m, layer in enumerate(table.layers):
            for name in layer.unit_axes:
                self.mean[m, name] = torch.zeros_like(getattr(layer, name), requires_grad=False)
                self.spread[m, name] = torch.zeros_like(self.mean[m, name])
        table.listeners.append(self._resized)

    def update(self, table: UnitTable, step: int) -> None:
        keys = [k for k in self.mean if getattr(table.layers[k[0]], k[1]).grad is not None]
        keys = [k for k in keys if self.mean[k].numel()]
        if not keys:
            return
        parameters = [getattr(table.layers[m], name) for m, name in keys]
        means, spreads = [self.mean[k] for k in keys], [self.spread[k] for k in keys]
        with torch.no_grad():
            now = torch._foreach_mul([p.detach() for p in parameters], [p.grad for p in parameters])
            torch._foreach_abs_(now)
            torch._foreach_lerp_(means, now, 1 - self.beta)
            torch._foreach_sub_(now, means)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(spreads, now, 1 - self.beta_uncertainty)

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        scores = torch.zeros(len(table))
        for m, layer in enumerate(table.layers):
            for name, axis in layer.unit_axes.items():
                sigma = self.mean[m, name] * self.spread[m, name]
                per_unit = sigma if sigma.dim() == 1 else sigma.mean(dim=1 - axis)
                scores[table.rows[m]] += per_unit.cpu().float()
        return scores

    def _resized(self, module: int, keep: Tensor, n_new: int) -> None:
        for name, axis in self._table.layers[module].unit_axes.items():
            for state in (self.mean, self.spread):
                kept = state[module, name].index_select(axis, keep.to(state[module, name].device))
                shape = list(kept.shape)
                shape[axis] = n_new
                state[module, name] = torch.cat([kept, kept.new_zeros(shape)], dim=axis)

    def state_dict(self) -> dict[str, Any]:
        mean = {f"mean.{m}.{name}": v for (m, name), v in self.mean.items()}
        return mean | {f"spread.{m}.{name}": v for (m, name), v in self.spread.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for m, name in self.mean:
            device = self.mean[m, name].device
            self.mean[m, name] = state[f"mean.{m}.{name}"].to(device, copy=True)
            self.spread[m, name] = state[f"spread.{m}.{name}"].to(device, copy=True)
