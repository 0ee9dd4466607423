"""B-LoRA's prior over gates (Meo et al., arXiv 2406.13046): every open gate costs, so ranks and bits must pay."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_cli.adapters.quantise import first_open, nested, open_probability
from dora_cli.allocation.regularizers.base import Regularizer, add_to_gradients
from dora_cli.allocation.schedules import Window
from dora_cli.allocation.table import Group, UnitTable
from dora_cli.allocation.verdict import Verdict
from dora_cli.errors import UserError

DUAL_RATE = 1e-4


@dataclass
class GateKl(Regularizer):
    """λ Σ Ω, up to the final choice. Per quantiser Ω = 1 + q_4 + q_4 q_8 + …, q = P(z > 0); E's is multiplied by the
    mean P(z > 0) of its r − 1 rank gates, each gate's own, as in the authors' code (METHODS 6).

    With ``target_rank``, dual ascent at every step: λ ← max(0, λ + ρ (E[rank] − target)), E[rank] the mean over modules
    of 1 + Σ_i Π_{j ≤ i} P(z_j > 0) (our design).
    """

    weight: float = field(default=1e-3, metadata={"help": "λ, what Ω is multiplied by in the loss", "low": 0.0})
    target_rank: float | None = field(
        default=None, metadata={"help": "expected rank per module that λ moves to reach; null: λ is fixed", "low": 1.0}
    )
    dual_rate: float | None = field(
        default=None,
        metadata={"help": "ρ: how far λ moves in a step per rank off target_rank; null: 1e-4", "above": 0.0},
    )

    needs: ClassVar[frozenset[str]] = frozenset({"gate_probability"})

    def __post_init__(self) -> None:
        if self.dual_rate is not None and self.target_rank is None:
            raise UserError(
                f"regularizer.dual_rate={self.dual_rate:g} moves λ towards regularizer.target_rank, which is not set",
                hint="set regularizer.target_rank, or leave regularizer.dual_rate out",
            )

    def attach(self, table: UnitTable) -> None:
        device = next(table.layers[0].parameters()).device if table.layers else torch.device("cpu")
        self.current = torch.tensor(self.weight, device=device)  # λ as it stands; on the device, so nothing waits
        self.before = self.current

    def active(self, step: int, window: Window) -> bool:
        return step <= window.end

    def value(self, table: UnitTable) -> float:
        return sum(float(penalty(group, phi, bits).sum()) for group, phi, bits in _logits(table))

    def after_backward(self, table: UnitTable) -> None:
        for group, phi, bits in _logits(table):
            with torch.enable_grad():
                phi, bits = phi.detach().requires_grad_(), bits.detach().requires_grad_()
                total = self.current * penalty(group, phi, bits).sum()
            gradients = torch.autograd.grad(total, (phi, bits))  # of a few logits, never through a layer
            for name, gradient in zip(("phi", "bit_logits"), gradients, strict=True):
                add_to_gradients(group.parameters(name), gradient, 1.0)
        self.before = self.current
        if self.target_rank is not None:
            off = expected_rank(table) - self.target_rank
            self.current = (self.current + (self.dual_rate or DUAL_RATE) * off).clamp_min(0.0)

    def conclude(self, verdict: Verdict) -> None:
        self.current = verdict.choose(self.current, self.before)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.current = state["weight"].to(self.current.device, copy=True)


def penalty(group: Group, phi: Tensor, bits: Tensor) -> Tensor:
    """(m,) Ω of each module, for rank-gate logits (m, r) and bit-gate logits (m, 3, n) of A, B and E."""
    of_a, of_b, of_e = (1 + nested(open_probability(bits)).sum(-1)).unbind(-1)
    exists = torch.ones_like(phi) if group.kept is None else group.kept
    gates, exists = open_probability(phi)[:, 1:], exists[:, 1:]
    n_gates = exists.sum(-1)
    mean = (gates * exists).sum(-1) / n_gates.clamp_min(1)
    return of_a + of_b + of_e * torch.where(n_gates > 0, mean, 1.0)  # a rank of 1 has no gate


def expected_rank(table: UnitTable) -> Tensor:
    """() the mean over modules of the expected rank, if gates are drawn independently."""
    ranks = []
    for group, phi, _ in _logits(table):
        reached = nested(first_open(open_probability(phi)))
        ranks.append((reached if group.kept is None else reached * group.kept).sum(-1))
    return torch.cat(ranks).mean()


def _logits(table: UnitTable) -> Iterator[tuple[Group, Tensor, Tensor]]:
    for group in table.groups():
        yield group, group.stack("phi"), group.stack("bit_logits")
