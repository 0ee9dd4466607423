"""AFLoRA's freezing score (Liu et al., ACL 2024, arXiv 2403.13269): how much a tensor's gradient still moves."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_cli.allocation.importance.base import Importance, Probe
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict


@dataclass
class FreezingScore(Importance):
    """I = |∂L/∂w| averaged over windows; at their ends Ī ← β₁Ī + (1−β₁)I, Ū ← β₂Ū + (1−β₂)|I − Ī|; score mean(Ī∘Ū).

    Low means that little is left to learn. Only tensors that still train are followed (METHODS 8).
    """

    window: int = field(default=10, metadata={"help": "optimizer steps that one gradient average spans", "low": 1})
    beta: float = field(default=0.85, metadata={"help": "smoothing of the gradient size", "low": 0.0, "below": 1.0})
    beta_uncertainty: float = field(
        default=0.95, metadata={"help": "smoothing of the uncertainty", "low": 0.0, "below": 1.0}
    )

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    units: ClassVar[frozenset[str]] = frozenset({"tensors"})

    def attach(self, table: UnitTable) -> None:
        # table row → sum over the window, mean, uncertainty, each in the tensor's shape
        self.state: dict[int, list[Tensor]] = {}
        self._device = next(table.layers[0].parameters()).device if table.layers else torch.device("cpu")
        self.seen = 0  # steps of this window
        self.taken = torch.zeros((), device=self._device)  # and how many of them the average is over

    def update(self, table: UnitTable, step: int, verdict: Verdict = TAKEN) -> None:
        self.seen += 1
        self.taken += verdict.taken
        ends = self.seen == self.window
        for row, tensor in self._training(table):
            if tensor.grad is None:
                continue
            if row not in self.state:
                self.state[row] = [torch.zeros_like(tensor.detach()) for _ in range(3)]
            total, mean, spread = self.state[row]
            total.add_(verdict.choose(tensor.grad.abs(), 0.0))
            if ends:
                now = torch.where(self.taken > 0, total / self.taken, mean)
                mean.lerp_(now, 1 - self.beta)
                off = torch.where(self.taken > 0, (now - mean).abs(), spread)
                spread.lerp_(off, 1 - self.beta_uncertainty)
                total.zero_()
        if ends:
            self.seen = 0
            self.taken.zero_()

    def scores(self, table: UnitTable, probe: Probe | None) -> Tensor:
        scores = torch.zeros(len(table))
        for row, (_, mean, spread) in self.state.items():
            scores[row] = (mean * spread).mean().cpu()
        return scores

    def elements(self, table: UnitTable, probe: Probe | None) -> list[Tensor]:
        none = torch.zeros(1, device=self._device)  # of a tensor that never trained
        products = {row: (mean * spread).flatten() for row, (_, mean, spread) in self.state.items()}
        return [products.get(row, none) for row in range(len(table))]

    def _training(self, table: UnitTable) -> list[tuple[int, Tensor]]:
        frozen = table.frozen.tolist()
        return [
            (row, tensor)
            for rows, layer in zip(table.rows, table.layers, strict=True)
            for row, tensor in zip(rows.tolist(), layer.unit_tensors(), strict=True)
            if not frozen[row]
        ]

    def state_dict(self) -> dict[str, Any]:
        tensors = {f"{row}.{i}": t for row, found in self.state.items() for i, t in enumerate(found)}
        return {**tensors, "seen": self.seen, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.seen = {}, int(state.pop("seen"))
        self.taken = state.pop("taken").to(self._device, copy=True)
        for key in state:
            row = int(key.split(".")[0])
            if row not in self.state:
                self.state[row] = [state[f"{row}.{i}"].to(self._device, copy=True) for i in range(3)]
