"""What the loss would lose with a component, to first order: ALoRA's ablation without its forwards (METHODS 5)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.importance.base import FlatScores
from dora_cli.allocation.table import Group, UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict


def gate_gradients(group: Group) -> Tensor:
    """∂L/∂g (m, r) for a factor g = 1 before each component; 0 where a layer took no part in the step.

    By the chain rule it is the product of the valve with its own gradient, summed over the component.
    """
    valve, axis = group.layers[0].valve, group.layers[0].unit_axes[group.layers[0].valve]
    pairs = [(getattr(layer, valve).detach(), getattr(layer, valve).grad) for layer in group.layers]
    now = torch.stack([v * (torch.zeros_like(v) if g is None else g) for v, g in pairs])
    # Over the entries: the axis, of the two behind the modules, without units.
    return now.sum(2 - axis) if now.dim() > 2 else now


@dataclass
class Gradient(FlatScores):
    """−∂L/∂g for a factor g = 1 before each component, smoothed: S(M) − S(M∖r) ≈ −∂L/∂g with S = −L.

    Negative where the loss would be lower without the component, to first order. By the chain rule ∂L/∂g is the product
    of the valve with its own gradient, summed over the component: c · ∂L/∂c, or ⟨b, ∂L/∂b⟩ where there are no gates. So
    one backward pass, the training step's own, scores every component. Weights are those after the step and gradients
    those before it, as in AdaLoRA's sensitivity.
    """

    beta: float = field(default=0.9, metadata={"help": "smoothing of the scores", "low": 0.0, "below": 1.0})

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def update(self, table: UnitTable, step: int, verdict: Verdict = TAKEN) -> None:
        smoothed = self._extended(table)
        for group in table.groups():
            before = smoothed[group.index]
            blend = self.beta * before + (1 - self.beta) * -gate_gradients(group).to(smoothed.dtype)
            smoothed[group.index] = verdict.choose(blend, before)
