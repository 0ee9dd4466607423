"""IncreLoRA's importance (Zhang et al. 2023, arXiv 2308.12043): how much the loss leans on a module's whole update."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_cli.adapters.base import AdapterLayer
from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict


@dataclass
class ModuleSensitivity(Importance):
    """I = Σ|ΔW ∘ ∂L/∂ΔW| / √(d_out · d_in); Ī ← β₁Ī + (1−β₁)I; Ū ← β₂Ū + (1−β₂)|I − Ī| with the new Ī; score Ī·Ū.

    Every component has its module's score. ∂L/∂ΔW = Σ_tokens dy xᵀ is formed from what each layer receives and gives
    back, summed over the micro-batches of a step before anything is taken absolutely; ΔW is the one it was taken at.
    x is the layer's input before the adapter's dropout. Up to the final choice this costs a full weight gradient:
    d_out · d_in multiplications per token and module, and one float32 matrix per module from the backward pass to the
    step. ``importance=sensitivity`` is the cheap way.
    """

    beta: float = field(default=0.85, metadata={"help": "smoothing of the sensitivity", "low": 0.0, "below": 1.0})
    beta_uncertainty: float = field(
        default=0.85, metadata={"help": "smoothing of the uncertainty", "low": 0.0, "below": 1.0}
    )

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    sums: ClassVar[bool] = True

    def attach(self, table: UnitTable) -> None:
        device = next(table.layers[0].parameters()).device if table.layers else torch.device("cpu")
        self.mean = torch.zeros(len(table.layers), device=device)
        self.spread = torch.zeros_like(self.mean)
        self.updates: dict[int, tuple[Tensor, Tensor]] = {}  # module → ΔW as a pair, when the gradient was taken
        self.gradients: dict[int, Tensor] = {}  # module → (d_out, d_in), of the step so far
        self._table = table
        for m, layer in enumerate(table.layers):
            layer.register_forward_hook(partial(self._watch, m))

    def update(self, table: UnitTable, step: int, verdict: Verdict = TAKEN) -> None:
        modules = sorted(self.gradients)
        if not modules:
            return
        now = torch.stack([self._sensitivity(m) for m in modules])
        # An index is sent to the device: only where some modules took no part in this step.
        index = slice(None) if len(modules) == len(self.mean) else torch.tensor(modules, device=now.device)
        mean = self.beta * self.mean[index] + (1 - self.beta) * now
        spread = self.beta_uncertainty * self.spread[index] + (1 - self.beta_uncertainty) * (now - mean).abs()
        self.mean[index] = verdict.choose(mean, self.mean[index])
        self.spread[index] = verdict.choose(spread, self.spread[index])

    def partial_sums(self) -> list[Tensor]:
        return [self.gradients[m] for m in sorted(self.gradients)]

    def close_period(self, table: UnitTable) -> None:
        """Let go of a step that nobody looked at (``prune_peft`` does not at the last)."""
        self.updates.clear()
        self.gradients.clear()

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        return (self.mean * self.spread).cpu()[table.module]

    @torch.compiler.disable
    def _watch(self, m: int, layer: AdapterLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """After a layer's forward pass: be there when its output's gradient comes back."""
        if layer.training and output.requires_grad and not self._table.settled:
            output.register_hook(partial(self._collect, m, inputs[0].detach()))

    def _collect(self, m: int, x: Tensor, dy: Tensor) -> None:
        layer = self._table.layers[m]
        if m not in self.updates:
            a, b = layer.low_rank()
            self.updates[m] = a.clone(), b.clone()
            self.gradients[m] = torch.zeros(layer.d_out, layer.d_in, device=dy.device)
        self.gradients[m].addmm_(dy.reshape(-1, layer.d_out).float().T, x.reshape(-1, layer.d_in).float())

    def _sensitivity(self, m: int) -> Tensor:
        """I of one module; its matrices go."""
        a, b = self.updates.pop(m)
        gradient = self.gradients.pop(m)
        size: float = gradient.numel() ** 0.5
        return (b @ a).mul_(gradient).abs_().sum() / size

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"].to(self.mean.device, copy=True)
        self.spread = state["spread"].to(self.spread.device, copy=True)
