"""DLoRA's Kill-and-Revive (Gao & Zhang, EMNLP Findings 2024, arXiv 2404.05182): few modules train, others may return.

The paper leaves score, thresholds, periods and the meaning of "killed" open; what is here is our design (METHODS 7).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_cli.adapters.base import AdapterLayer, LowRankLayer
from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.schedules import Window
from dora_cli.allocation.select import ranking
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict
from dora_cli.errors import UserError

ACTIVE, IDLE, PROBATION = 0, 1, 2


def traffic(layers: Sequence[AdapterLayer], training: Sequence[bool], tokens: int = 1) -> int:
    """Values between device and cloud in one training step, were they apart and idle modules off (METHODS 7).

    Each training module receives d_in values a token and returns d_out, and its gradients go the other way.
    """
    return tokens * sum(2 * (la.d_in + la.d_out) for la, trains in zip(layers, training, strict=True) if trains)


def flops(layers: Sequence[AdapterLayer], training: Sequence[bool], tokens: int = 1) -> int:
    """Floating-point operations of low-rank adapters in one training step: 2r(d_in + d_out), thrice with backward."""
    pairs = zip(layers, training, strict=True)
    return tokens * sum(6 * la.rank * (la.d_in + la.d_out) for la, trains in pairs if trains)


@dataclass
class KillAndRevive(Allocator):
    """The schedule counts the modules that train, from all of them down to ``active`` of them, the best by score.

    Every ``revive_every``-th event sets that many fewer apart and lets idle modules train in their place, on
    probation: at the next event all that train are ranked together. So the number in training is the schedule's
    throughout. Events fall on every period from the first step on; up to ``schedule.start`` all modules train, from
    ``schedule.end`` on the set is final and trains to the end of the run.
    """

    interval: int | float = field(
        default=0.01, metadata={"help": "the period: steps, or a share of the run", "above": 0}
    )
    active: float = field(
        default=0.125, metadata={"help": "share of the modules that train at the end", "above": 0.0, "high": 1.0}
    )
    least: int = field(default=1, metadata={"help": "modules that train at least", "low": 1})
    revive_every: int = field(default=2, metadata={"help": "periods between revivals", "low": 1})
    probation: int | None = field(
        default=None, metadata={"help": "modules revived at a time; null: one in 32, at least one", "low": 0}
    )
    choice: str = field(
        default="round_robin",
        metadata={"help": "who is revived: each in turn, or by gradient", "choices": ("round_robin", "probe")},
    )
    killed: str = field(
        default="freeze",
        metadata={"help": "an idle module still contributes, or is off", "choices": ("freeze", "drop")},
    )
    state: str = field(
        default="drop", metadata={"help": "the optimizer's moments of idle modules", "choices": ("drop", "keep")}
    )

    verbs: ClassVar[frozenset[str]] = frozenset({"freeze", "thaw", "silence"})
    units: ClassVar[frozenset[str]] = frozenset({"modules"})
    mode: ClassVar[str] = "static"
    compacts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.choice == "probe" and self.killed == "drop":
            raise UserError(
                "allocator.choice=probe asks idle modules for their gradients, and allocator.killed=drop switches "
                "them off",
                hint="use allocator.killed=freeze, or allocator.choice=round_robin",
            )

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        n = len(table)
        return n, min(n, max(self.least, round(self.active * n)))

    def attach(self, table: UnitTable) -> None:
        self.table = table
        self.states = torch.full((len(table),), ACTIVE)
        self.turn = 0  # the module whose turn it is to be revived
        self.probing = False  # idle modules have their gradients, for the next step alone
        self.worth = torch.zeros(len(table))

    def final_step(self, window: Window) -> int:
        """With idle modules off, what is exported must be the set that the run ends with."""
        return window.end if self.killed == "drop" else 0

    def is_event(self, step: int, window: Window) -> bool:
        """Every period is measured, those before the start too."""
        periodic = (step - window.start) % self.steps_between(window.total) == 0
        return step == window.end or (periodic and 0 < step < window.end)

    def act(self, event: Event) -> None:
        idle = torch.nonzero(self.states == IDLE).flatten()
        revives = self._revives(event.step, event.window)
        trial = min(self._probation(len(self.states)), event.limit - 1, len(idle)) if revives else 0
        ranked = ranking(event.table, event.scores(), self.states != IDLE)
        self.states = torch.full_like(self.states, IDLE)
        self.states[ranked[: event.limit - trial]] = ACTIVE
        self.states[self._next(idle, trial)] = PROBATION
        self._apply(event)

    def after_step(self, table: UnitTable, step: int, window: Window, verdict: Verdict = TAKEN) -> None:
        """Before a step that ends with a revival by gradient, let gradients flow into idle modules."""
        if self.choice == "probe" and self._revives(step + 1, window):
            self._probe(True)

    def after_backward(self, table: UnitTable, step: int, window: Window) -> None:
        """Read those gradients and take them away again: they weigh nothing in clipping and move nothing."""
        if self.probing:
            # Of a step that is skipped the sizes may be no numbers; such modules are revived last.
            self.worth = torch.stack([_gradient_size(layer) for layer in table.layers]).cpu().nan_to_num(0.0, 0.0, 0.0)
            self._probe(False)

    def report(self, table: UnitTable) -> dict[str, Any]:
        named = {
            word: [name for name, state in zip(table.names, self.states.tolist(), strict=True) if state == value]
            for word, value in (("idle", IDLE), ("probation", PROBATION))
        }
        if self.killed == "freeze":
            return named
        training = (self.states != IDLE).tolist()
        per_token = {"values": traffic(table.layers, training)}
        if all(isinstance(layer, LowRankLayer) for layer in table.layers):
            per_token["flops"] = flops(table.layers, training)
        return {**named, "per_token": per_token}

    # ---- inside --------------------------------------------------------------------------------------------------
    def _revives(self, step: int, window: Window) -> bool:
        """Whether modules go on probation after this step: every so many periods, but not for the final choice."""
        periods, rest = divmod(step - window.start, self.steps_between(window.total))
        return rest == 0 and periods > 0 and periods % self.revive_every == 0 and step < window.end

    def _probation(self, n: int) -> int:
        return max(1, n // 32) if self.probation is None else self.probation

    def _next(self, idle: Tensor, n: int) -> Tensor:
        """The ``n`` of the ``idle`` modules that are revived."""
        if self.choice == "probe":
            return idle[torch.argsort(self.worth[idle], descending=True, stable=True)[:n]]
        in_turn = idle[torch.argsort((idle - self.turn) % len(self.states))[:n]]
        if n:
            self.turn = (int(in_turn[-1]) + 1) % len(self.states)
        return in_turn

    def _apply(self, event: Event) -> None:
        """Make layers and optimizer what ``states`` says."""
        idle = self.states == IDLE
        # Without the optimizer, freezing leaves the moments; thawing puts exactly what trains into its groups.
        event.table.freeze(idle, event.optimizer if self.state == "drop" else None)
        event.table.thaw(~idle, event.optimizer)
        if self.killed == "drop":
            event.table.switch(~idle)

    def _probe(self, on: bool) -> None:
        """Gradients for idle modules, or none; they stay outside the optimizer."""
        self.probing = on
        for m in torch.nonzero(self.states == IDLE).flatten().tolist():
            (self.table.owners[m].thaw if on else self.table.owners[m].freeze)(None)

    # ---- state ---------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"states": self.states, "turn": self.turn, "probing": int(self.probing)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states, self.turn = state["states"], int(state["turn"])
        if state["probing"]:
            self._probe(True)


def _gradient_size(layer: AdapterLayer) -> Tensor:
    """‖∂L/∂B‖_F ‖A‖_F; ‖∂L/∂θ‖ ‖θ‖ over all that trains where there are no such factors. 0 without gradients."""
    if isinstance(layer, LowRankLayer):
        moving, held = [layer.b], [layer.a]
    else:
        moving = held = list(layer.adapter_parameters().values())
    gradients = [p.grad.flatten() for p in moving if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=held[0].device)  # the base may be elsewhere
    return torch.cat(gradients).norm() * torch.cat([p.detach().flatten() for p in held]).norm()
