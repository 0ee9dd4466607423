"""How far a module's update has moved since the last event: DLoRA's signal (Gao & Zhang, EMNLP Findings 2024).

The paper (arXiv 2404.05182) does not say how it tells active modules from idle ones; this measure is our design
(METHODS 7).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_cli.adapters.base import AdapterLayer, dense_weight
from dora_cli.allocation.importance.base import FlatScores
from dora_cli.allocation.table import UnitTable

EPSILON = 1e-12

Pair = tuple[Tensor, Tensor]  # (r, d_in), (d_out, r)


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """‖BA‖_F for a (r, d_in) and b (d_out, r), from two r × r Gram matrices: ‖BA‖² = Σᵢⱼ (BᵀB ∘ AAᵀ)ᵢⱼ."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()


def distance(now: Pair, before: Pair) -> Tensor:
    """‖BA − B⁰A⁰‖_F, never formed.

    BA − B⁰A⁰ = [B − B⁰, B⁰] [A; A − A⁰]: both pieces are as small as the move, so that little is lost to rounding, as
    would be with [B, −B⁰] [A; A⁰].
    """
    (a, b), (a0, b0) = now, before
    return product_norm(torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1))


@dataclass
class Displacement(FlatScores):
    """u = ‖BA − B⁰A⁰‖_F / (‖B⁰A⁰‖_F + ε) between two events, A and B with every scale and gate folded in.

    Where B⁰A⁰ = 0, as at the start, u is ‖BA‖_F / ‖W₀‖_F. Only modules that train are measured. The smoothed
    ũ ← β ũ + (1 − β) u begins with u itself, and begins anew with a module that returns: a rate of long ago says
    nothing now. ``measure=parameters`` takes ‖θ − θ⁰‖ / ‖θ⁰‖ instead, as do modules whose update is no low-rank pair.
    """

    beta: float = field(default=0.5, metadata={"help": "smoothing of the scores", "low": 0.0, "below": 1.0})
    measure: str = field(
        default="update",
        metadata={"help": "what moves: a module's update, or its parameters", "choices": ("update", "parameters")},
    )

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    units: ClassVar[frozenset[str]] = frozenset({"modules"})

    def attach(self, table: UnitTable) -> None:
        super().attach(table)
        self.counted = torch.zeros(
            len(table), dtype=torch.bool
        )  # trained in the last period: there is a ũ to go on from
        self.before = [self._snapshot(layer) for layer in table.layers]
        self.base_norms = [dense_weight(layer.base_layer).norm() for layer in table.layers]

    def close_period(self, table: UnitTable) -> None:
        training = ~table.frozen
        rows = torch.nonzero(training).flatten().tolist()
        if rows:
            moved = torch.stack([self._move(table, row) for row in rows]).to(self.smoothed)
            index = torch.tensor(rows, device=moved.device)
            going_on = self.counted[rows].to(moved.device)
            blend = self.beta * self.smoothed[index] + (1 - self.beta) * moved
            self.smoothed[index] = torch.where(going_on, blend, moved)
        self.counted = training.clone()

    def _move(self, table: UnitTable, row: int) -> Tensor:
        """u of one module; the next period starts from where it is now."""
        before, now = self.before[row], self._snapshot(table.layers[row])
        self.before[row] = now
        size = product_norm(*before)
        return distance(now, before) / torch.where(size > 0, size + EPSILON, self.base_norms[row])

    def _snapshot(self, layer: AdapterLayer) -> Pair:
        if self.measure == "update" and layer.is_low_rank:
            a, b = layer.low_rank()
            return a.clone(), b.clone()
        # A vector is a product too, of itself and the number one.
        flat = torch.cat([p.detach().float().flatten() for p in layer.adapter_parameters().values()])
        return flat[None], torch.ones(1, 1, device=flat.device)

    def state_dict(self) -> dict[str, Any]:
        pairs = {f"{name}.{m}": t for m, pair in enumerate(self.before) for name, t in zip("ab", pair, strict=True)}
        return super().state_dict() | {"counted": self.counted} | pairs

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.counted = state["counted"]
        device = self.smoothed.device
        self.before = [
            (state[f"a.{m}"].to(device, copy=True), state[f"b.{m}"].to(device, copy=True))
            for m in range(len(self.before))
        ]
