"""AdaLoRA's importance (Zhang et al.): smoothed sensitivity times its smoothed uncertainty, per element."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.table import Group, UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict


class Stack(NamedTuple):
    """The state of one parameter of all layers of a group, (m, …)."""

    group: Group
    name: str
    mean: Tensor
    spread: Tensor


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
        self._stacks: list[Stack] = []
        self._stacked_at = -1  # the table's version that the stacks belong to
        table.listeners.append(self._resized)

    def update(self, table: UnitTable, step: int, verdict: Verdict = TAKEN) -> None:
        for stack in self._stacked(table):
            gradients = [p.grad for p in stack.group.parameters(stack.name)]
            held = [i for i, gradient in enumerate(gradients) if gradient is not None]
            if not held:
                continue
            now = torch.stack([g for g in gradients if g is not None])
            # An index copies: only where some layers took no part in this step.
            rows = slice(None) if len(held) == len(gradients) else torch.tensor(held, device=now.device)
            mean, spread = stack.mean[rows], stack.spread[rows]
            now.mul_(stack.group.stack(stack.name)[rows]).abs_()
            # Towards itself a tensor moves by nothing, to the bit.
            mean.lerp_(verdict.choose(now, mean), 1 - self.beta)
            now.sub_(mean).abs_()
            spread.lerp_(verdict.choose(now, spread), 1 - self.beta_uncertainty)
            if len(held) < len(gradients):
                stack.mean[rows], stack.spread[rows] = mean, spread

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        device = next(table.layers[0].parameters()).device if table.layers else torch.device("cpu")
        scores = torch.zeros(len(table), device=device)
        for stack in self._stacked(table):
            sigma = stack.mean * stack.spread  # (m, …), of which the last two axes are the units and the entries
            axis = stack.group.layers[0].unit_axes[stack.name]
            scores[stack.group.index] += (sigma if sigma.dim() == 2 else sigma.mean(dim=2 - axis)).float()
        return scores.cpu()

    def _stacked(self, table: UnitTable) -> list[Stack]:
        """The state of parameters of one shape in one tensor each, of which ``mean`` and ``spread`` are views."""
        if self._stacked_at != table.version:
            self._stacks, self._stacked_at = [], table.version
            for group in table.groups():
                for name in group.layers[0].unit_axes:
                    keys = [(m, name) for m in group.modules]
                    mean, spread = (torch.stack([state[k] for k in keys]) for state in (self.mean, self.spread))
                    self.mean.update(zip(keys, mean, strict=True))
                    self.spread.update(zip(keys, spread, strict=True))
                    self._stacks.append(Stack(group, name, mean, spread))
        return self._stacks

    def _resized(self, module: int, keep: Tensor, n_new: int) -> None:
        self._stacks, self._stacked_at = [], -1  # let go of the rows that go
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
        self._stacks, self._stacked_at = [], -1
