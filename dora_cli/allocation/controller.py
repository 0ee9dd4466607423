"""All that a training loop calls: two hooks, and the state between them.

allocation = Allocation(layers, schedule=…, importance=…, allocator=…, regularizer=…, total_steps=T, target=…)
for step in range(1, T + 1):
    loss.backward()
    allocation.after_backward(step)            # before clipping
    optimizer.step()
    event = allocation.after_step(step, optimizer)   # before gradients are cleared
    optimizer.zero_grad()
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dora_cli.adapters.base import AdapterLayer, LowRankLayer
from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.importance.base import Importance
from dora_cli.allocation.regularizers.base import Regularizer
from dora_cli.allocation.schedules import Auto, Schedule
from dora_cli.allocation.select import prefix_closed
from dora_cli.allocation.standing import standing
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.trials import Trials
from dora_cli.allocation.verdict import TAKEN, Verdict

DEAD_SHARE = 0.25  # compact before the end only when this much is dead, and
MAX_COMPACTIONS = 6  # at most this often, so that torch.compile keeps its graphs


class Allocation:
    """Joins schedule, importance, allocator and regularizer over adapted layers.

    Args:
        layers: full module name → adapted layer, in module order.
        total_steps: optimizer steps T of the run; steps count from 1.
        target: the resolved budget; None where the method has none.
        probe: the loss on a fixed validation batch, for importances that need it.
        held_out: the loss on held-out rows, for a schedule that finds the budget.
        units: what is allocated: ``components``, ``tensors``, or whole ``modules``.
        agree: of several processes, gives each the scores of one of them, so that all choose the same to the bit.
        rebuilds: whether what is dropped leaves its tensors while training goes on; where not, they keep their shapes,
            and ``table.compact()`` may be called afterwards. The weights that are left are the same.

    Raises:
        UserError: the schedule's window does not fit the run, or the allocator needs a budget and has none.
    """

    def __init__(
        self,
        layers: Mapping[str, AdapterLayer],
        *,
        schedule: Schedule,
        importance: Importance,
        allocator: Allocator,
        regularizer: Regularizer,
        total_steps: int,
        target: Target | None = None,
        probe: Callable[[], float] | None = None,
        held_out: Callable[[], float] | None = None,
        units: str = "components",
        agree: Callable[[Tensor], Tensor] = lambda scores: scores,
        rebuilds: bool = True,
    ) -> None:
        self.table = UnitTable(layers, units)
        if isinstance(schedule, Auto):
            allocator = Trials(schedule, allocator, self._held_out)
        self.schedule, self.importance, self.allocator, self.regularizer = schedule, importance, allocator, regularizer
        self.window = allocator.window(schedule, total_steps)
        self.by_cost = target is not None and target.by_cost and allocator.mode in ("shrink", "grow", "constant")
        self.first, self.last = allocator.bounds(self.table, target)
        self.probe, self.held_out, self.agree, self.rebuilds = probe, held_out, agree, rebuilds
        self.start_count, self.start_cost = len(self.table), int(self.table.cost.sum())
        allocator.attach(self.table)
        importance.attach(self.table)
        regularizer.attach(self.table)

    @property
    def final_step(self) -> int:
        """The step of the final choice; 0 where none is made, or where every moment is on budget anyway."""
        return self.allocator.final_step(self.window)

    @property
    def most_count(self) -> int:
        """Units that will ever live at once, at most: those of the start, or what the budget allows to grow."""
        if not self.allocator.grows or not len(self.table):
            return self.start_count
        return self.last // int(self.table.cost.min()) if self.by_cost else self.last

    def is_event(self, step: int) -> bool:
        """Whether the allocator acts after this step."""
        if self.schedule.one_event and step != self.window.end:
            return False
        return self.allocator.is_event(step, self.window)

    def counts(self, steps: Sequence[int]) -> list[int]:
        """What may live after each of the events at ``steps``; where that is found by trial, at least."""
        if isinstance(self.schedule, Auto):
            return self.schedule.fastest(self.first, self.last, len(steps))
        return [self.schedule.count(step, self.window, self.first, self.last) for step in steps]

    def on_empty(self, callback: Callable[[str], None]) -> None:
        """Call back with the name of each module in which nothing lives and nothing can return."""
        if not self.allocator.grows:
            self.table.on_empty = callback

    def after_backward(self, step: int) -> None:
        """Add the regularizer's gradient, and take out what belongs to dropped units. Before clipping."""
        if self.regularizer.acts and self.regularizer.active(step, self.window):
            self.regularizer.after_backward(self.table)
        self.allocator.after_backward(self.table, step, self.window)
        if self.allocator.compacts:
            self.table.mute()

    def after_step(self, step: int, optimizer: Optimizer, verdict: Verdict = TAKEN) -> dict[str, Any] | None:
        """Score, act if it is time, and keep closed what is dropped. Gradients must still be there.

        Args:
            verdict: whether the step was taken. Where it was not (its loss or gradient was not finite) nothing moves on
                its account; events fall all the same, on what was seen before.

        Returns:
            What happened, where an event fell on this step: step, budget, alive, params, ranks per module, and how
            the units stood where they were scored (``standing``).
        """
        if self.regularizer.active(step, self.window):
            self.regularizer.conclude(verdict)
            if self.regularizer.decoupled:
                self.regularizer.after_step(self.table, self._learning_rate(optimizer), verdict)
        self.allocator.after_step(self.table, step, self.window, verdict)
        if self.allocator.observes(step, self.window):
            self.importance.update(self.table, step, verdict)
        event = self._act(step, optimizer) if self.is_event(step) else None
        self.table.hold()
        self._compact(step, optimizer)
        return event

    def _act(self, step: int, optimizer: Optimizer) -> dict[str, Any]:
        limit = self.schedule.count(step, self.window, self.first, self.last)
        self.importance.close_period(self.table)
        ranked, before = ~self.table.dropped, self.table.alive
        seen: list[Tensor] = []  # what the allocator asked for

        def scores() -> Tensor:
            seen.append(self._scores())
            return seen[-1]

        self.allocator.act(
            Event(
                step=step,
                final=step == self.window.end,
                limit=limit,
                first=self.first,
                last=self.last,
                by_cost=self.by_cost,
                scores=scores,
                elements=self._elements,
                table=self.table,
                schedule=self.schedule,
                window=self.window,
                optimizer=optimizer,
                agree=self.agree,
            )
        )
        if step == self.window.end:
            self.table.settle()
        return {
            "step": step,
            "budget": limit,
            "budget_unit": "parameters" if self.by_cost else self.table.kind,
            "alive": self.alive_count(),
            "params": self.table.alive_cost(),
            "ranks": self.table.ranks(),
            **self.allocator.report(self.table),
            **({"standing": standing(self.table, ranked, before, seen[-1])} if seen else {}),
        }

    def alive_count(self) -> int:
        """Units that live and train."""
        return int((self.table.alive & ~self.table.frozen).sum())

    def _scores(self) -> Tensor:
        scores = self.importance.scores(self.table, self._masked_loss if self.probe else None)
        if self.by_cost and self.allocator.cost_aware:  # here, so that records show what was ranked
            scores = scores / self.table.cost
        return prefix_closed(self.table, self.agree(scores))

    def _elements(self) -> list[Tensor]:
        elements = self.importance.elements(self.table, self._masked_loss if self.probe else None)
        return list(self.agree(torch.cat(elements)).split([len(flat) for flat in elements])) if elements else []

    def _held_out(self) -> float:
        assert self.held_out is not None, "whoever builds the loop gives one to a schedule that asks for it"
        return float(self.agree(torch.tensor([self.held_out()], dtype=torch.float64)))

    def _masked_loss(self, mask: Tensor) -> float:
        assert self.probe is not None
        with self.table.only(mask):
            return self.probe()

    def _compact(self, step: int, optimizer: Optimizer) -> None:
        if not (self.allocator.compacts and self.rebuilds) or not self.table.dead():
            return
        early = self.table.dead_share() >= DEAD_SHARE and self.table.compactions < MAX_COMPACTIONS
        if step == self.window.end or early:
            self.table.compact(optimizer)

    def _learning_rate(self, optimizer: Optimizer) -> float:
        """That of the adapters' group, whichever modules are left."""
        mine = {id(p) for layer in self.table.layers for p in layer.adapter_parameters().values()}
        return next((g["lr"] for g in optimizer.param_groups if any(id(p) in mine for p in g["params"])), 0.0)

    def unit_state(self) -> dict[str, Tensor]:
        """What is particular to this method, a row per unit that ever was, for a file beside the adapter.

        ``module``, ``order``, ``cost``, ``alive``, ``frozen``; ``gate`` (0 for units that are gone) and ``score`` where
        the parametrisation and the importance have them, of shape (n,), on the CPU; and what a layer has to say of
        itself, under its module's name.
        """
        table = self.table
        state = {name: getattr(table, name).clone() for name in ("module", "order", "cost", "alive", "frozen")}
        gate = torch.zeros(len(table))
        for m, layer in enumerate(table.layers):
            if isinstance(layer, LowRankLayer) and table.kind == "components":
                gate[table.rows[m]] = layer.gates().detach().float().cpu()
            state |= {f"{table.names[m]}.{name}": value for name, value in layer.side_state().items()}
        state["gate"] = gate
        if self.allocator.scores and "probe" not in self.importance.needs:
            state["score"] = self.importance.scores(table, None).float()
        return state if len(table) else {}

    # ---- state ---------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Everything exact resume needs beside parameters and moments: tensors and plain numbers, one level deep."""
        return {
            "table": self.table.state_dict(),
            "importance": self.importance.state_dict(),
            "allocator": self.allocator.state_dict(),
            "regularizer": self.regularizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Give the layers the shapes they had; their values must be loaded afterwards, and the optimizer built."""
        self.table.load_state_dict(state["table"])
        self.importance.load_state_dict(dict(state["importance"]))
        self.allocator.load_state_dict(dict(state["allocator"]))
        self.regularizer.load_state_dict(dict(state["regularizer"]))
