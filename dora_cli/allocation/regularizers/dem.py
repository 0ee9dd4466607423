"""DoRA's Dimensional Equilibrium Modulator (Mao et al., Eq. 10): a component's entries stay even."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dora_cli.allocation.regularizers.base import Regularizer, add_to_gradients
from dora_cli.allocation.schedules import Window
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict


@dataclass
class Dem(Regularizer):
    """R = κ Σ_i (Var(a_i) + Var(b_i)), unbiased variances; κ = 1/(2N) in the official code, 1/n in the paper, both with
    the number of components at the start. ∂R/∂a_ij = κ · 2(a_ij − ā_i)/(d_in − 1), and alike for b (METHODS 2.6).
    """

    weight: float = field(default=0.3, metadata={"help": "η, what R is multiplied by in the loss", "low": 0.0})
    normaliser: str = field(
        default="code", metadata={"help": "κ: 1/(2N) as the code, 1/N as the paper", "choices": ("code", "paper")}
    )
    until: str = field(
        default="end", metadata={"help": "up to the final choice, or always", "choices": ("end", "always")}
    )
    mode: str = field(
        default="loss",
        metadata={"help": "part of the loss, or a step of its own beside AdamW's", "choices": ("loss", "decoupled")},
    )

    def attach(self, table: UnitTable) -> None:
        self.kappa = 1.0 / (max(len(table), 1) * (2 if self.normaliser == "code" else 1))

    @property
    def decoupled(self) -> bool:
        return self.mode == "decoupled"

    def active(self, step: int, window: Window) -> bool:
        return self.until == "always" or step <= window.end

    def value(self, table: UnitTable) -> float:
        variances = [c.square().sum() / (c.shape[axis] - 1) for _, c, axis in self._centred(table)]
        return self.kappa * float(torch.stack(variances).sum()) if variances else 0.0

    def after_backward(self, table: UnitTable) -> None:
        if self.mode == "loss":
            for parameters, centred, axis in self._centred(table):
                add_to_gradients(parameters, centred, self.weight * self.kappa * 2 / (centred.shape[axis] - 1))

    def after_step(self, table: UnitTable, learning_rate: float, verdict: Verdict = TAKEN) -> None:
        for parameters, centred, axis in self._centred(table):
            scale = learning_rate * self.weight * self.kappa * 2 / (centred.shape[axis] - 1)
            torch._foreach_add_(
                [p.data for p in parameters], list(verdict.choose(centred, 0.0).unbind(0)), alpha=-scale
            )

    def _centred(self, table: UnitTable) -> Iterator[tuple[Sequence[nn.Parameter], Tensor, int]]:
        """(parameters of one shape, (m, *shape) entries minus their component's mean, the axis of the entries)."""
        for group in table.groups():
            for name, axis in (("a", -1), ("b", -2)):
                stacked = group.stack(name)
                if stacked.shape[axis] > 1:
                    centred = stacked - stacked.mean(axis, keepdim=True)
                    if group.kept is not None:  # a dropped unit is gone, also while its rows still wait to be removed
                        centred *= group.kept.unsqueeze(axis)
                    yield group.parameters(name), centred, axis
