"""``schedule=auto``: whether a cut may stay is not planned, it is tried (METHODS 11.2)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dora_cli.adapters.base import AdapterLayer
from dora_cli.adapters.copies import copied, put_back
from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.schedules import Auto, Window
from dora_cli.allocation.select import top
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict
from dora_cli.errors import UserError

COPY = "copy|"  # before the keys of copied values in the state


class Trials(Allocator):
    """Takes an allocator's place: what its importance ranks lowest is cut, and at the next event dropped or put back.

    What is cut is silent until then: closed, without gradients, and out of what lives; the others learn to do without.
    Put back, it has the values and moments that it was cut with, to the bit, and the next cut is half as large. Nothing
    is tried before the loss has fallen by more than what is tolerated: else no cut could lose what was learned. When
    cuts have failed too often, it waits for as much again: else one lucky best would end the search of a whole run.

    Args:
        schedule: how much is cut, and what is tolerated.
        allocator: the one that was chosen; says when events fall, and what each module keeps.
        loss: of held-out rows, of the model as it is; the same in every process.

    Attributes:
        pending: (n,) bool, what is cut and not decided.
        initial: the loss before the first step.
        below: what ``best`` must lie below for a cut to be tried: the tolerance below ``initial``, or below the best
            loss of the time when the search gave up.
        best: the lowest loss that an event has seen with everything in place or gone for good.
        cut: the share that the next cut takes.
        refused: cuts in a row that were put back.
        at_floor: whether as little is left as may be.
    """

    def __init__(self, schedule: Auto, allocator: Allocator, loss: Callable[[], float]) -> None:
        self.schedule, self.allocator, self.loss = schedule, allocator, loss
        self.interval = allocator.interval
        self.min_rank: int = getattr(allocator, "min_rank", 0)
        self.initial: float | None = None
        self.below = math.inf
        self.best, self.cut, self.refused, self.at_floor = math.inf, schedule.cut, 0, False
        self.decision: dict[str, Any] = {}

    def attach(self, table: UnitTable) -> None:
        self.pending = torch.zeros(len(table), dtype=torch.bool)
        self.copies: dict[str, Tensor] = {}
        self._places: tuple[int, list[tuple[AdapterLayer, Tensor]]] | None = None

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        """What lives at the start, and at least."""
        ranks = table.ranks().values()
        each = sum(  # nested: nothing without the first
            min(rank, max(self.min_rank, int(layer.nested))) for layer, rank in zip(table.layers, ranks, strict=True)
        )
        first, self.floor = table.alive_count(), max(self.schedule.floor, each)
        if self.floor >= first:
            most = f"schedule.floor={self.floor}" if each < self.floor else f"{each} that modules keep at least"
            raise UserError(
                f"schedule=auto has nothing to prune: the adapter starts with {first} components",
                where=f"and these are to be left: {most}",
                hint="raise adapter.rank, or lower what is to be left",
            )
        return first, self.floor

    def window(self, schedule: Any, total: int) -> Window:
        return self.allocator.window(schedule, total)

    def is_event(self, step: int, window: Window) -> bool:
        """At the floor the final choice alone is left."""
        if step == window.end or self.at_floor:
            return step == window.end
        every = self.schedule.spacing(self.steps_between(window.total), window)
        return window.start <= step < window.end and (step - window.start) % every == 0

    def after_backward(self, table: UnitTable, step: int, window: Window) -> None:
        if self.initial is None:
            self.initial = self.loss()
            self.below = self._tolerably_below(self.initial)
        for layer, units in self._held(table):
            layer.mute_gradient(units)

    def after_step(self, table: UnitTable, step: int, window: Window, verdict: Verdict = TAKEN) -> None:
        """Moments that are left, decay and regularizers would open them again."""
        for layer, units in self._held(table):
            layer.silence(units)

    def act(self, event: Event) -> None:
        table, loss = event.table, self.loss()
        tried, share, kept = int(self.pending.sum()), self.cut, None
        if tried:
            most = self.best + self.schedule.tolerance * abs(self.best) if math.isfinite(self.best) else math.inf
            kept = math.isfinite(loss) and loss <= most
            if kept:
                self._commit(table)
            else:
                self._put_back(table, event.optimizer)
        if kept is not False and loss < self.best:
            self.best = loss
        self.decision = {"loss": loss, "best": self.best, "tried": tried, "committed": kept, "cut": share}
        below = self.below if math.isfinite(self.below) else None
        self.decision |= {"initial": self.initial, "below": below, "learned": self.learned}
        if self.learned and not event.final and not self.at_floor:
            self._try(event)

    @property
    def learned(self) -> bool:
        """Whether the loss has fallen by more than what is tolerated, from the start or since the search gave up."""
        return self.best < self.below

    def _tolerably_below(self, loss: float) -> float:
        """From a loss that is no number any other has fallen."""
        return loss - self.schedule.tolerance * abs(loss) if math.isfinite(loss) else math.inf

    def report(self, table: UnitTable) -> dict[str, Any]:
        """``budget`` is what lives for certain, or is on trial; ``auto`` what was decided, before the next trial."""
        return {"budget": table.alive_count() + int(self.pending.sum()), "auto": self.decision}

    # ---- one trial -----------------------------------------------------------------------------------------------
    def _try(self, event: Event) -> None:
        table = event.table
        alive = table.alive_count()
        n = self.schedule.size(self.cut, alive, self.floor)
        if n == 0:
            self.at_floor = True
            return
        self.allocator.prepare(event)
        keep = top(table, event.scores(), alive - n, by_cost=False, min_rank=self.min_rank)
        self.pending = table.alive & ~keep
        self.copies = {
            f"{m}|{key}": values
            for m, layer, units in self._cut(table)
            for key, values in copied(layer, units, event.optimizer).items()
        }
        table.keep(keep, final=False)

    def _commit(self, table: UnitTable) -> None:
        table.drop(self.pending)
        self.cut, self.refused = self.schedule.grown(self.cut), 0
        self._forget()

    def _put_back(self, table: UnitTable, optimizer: Optimizer | None) -> None:
        for m, layer, units in self._cut(table):
            mine = {key.partition("|")[2]: v for key, v in self.copies.items() if key.startswith(f"{m}|")}
            put_back(layer, units, mine, optimizer)
        table.wake(torch.nonzero(self.pending).flatten())
        self.cut, self.refused = self.cut / 2, self.refused + 1
        # Asked only of a smaller cut than one that failed: of few components even a small share is one.
        if self.refused >= self.schedule.patience or self.cut * table.alive_count() < 1:
            self.below = self._tolerably_below(self.best)
            self.cut, self.refused = self.schedule.cut, 0
        self._forget()

    def _forget(self) -> None:
        self.pending, self.copies, self._places = torch.zeros_like(self.pending), {}, None

    def _cut(self, table: UnitTable) -> Iterable[tuple[int, AdapterLayer, Tensor]]:
        """(module's number, layer, positions) of what is cut; rows keep their order in a module, wherever they are."""
        numbers = {id(layer): m for m, layer in enumerate(table.layers)}
        return ((numbers[id(layer)], layer, units) for layer, units in table.positions(self.pending))

    def _held(self, table: UnitTable) -> list[tuple[AdapterLayer, Tensor]]:
        """What is cut, looked up only after a change."""
        if not self.copies:
            return []
        if self._places is None or self._places[0] != table.version:
            self._places = table.version, list(table.positions(self.pending))
        return self._places[1]

    # ---- state ---------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        numbers = {"cut": self.cut, "refused": self.refused, "at_floor": int(self.at_floor)}
        losses = {"best": self.best, "initial": self.initial, "below": self.below}
        finite = {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return {"pending": self.pending} | numbers | finite | {COPY + key: value for key, value in self.copies.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pending = state["pending"].cpu()
        self.cut, self.refused = float(state["cut"]), int(state["refused"])
        # Older states have `done`, also of a search that gave up; one at the floor finds it again at its next event.
        self.at_floor = bool(state.get("at_floor", False))
        self.best, self.initial = float(state.get("best", math.inf)), float(state.get("initial", math.inf))
        self.below = float(state.get("below", self._tolerably_below(self.initial)))
        self.copies = {key.removeprefix(COPY): value for key, value in state.items() if key.startswith(COPY)}
        self._places = None
