"""IncreLoRA's allocator (Zhang et al. 2023, arXiv 2308.12043): from a component or so per module up to the budget."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from dora_cli.allocation.allocators.base import Allocator, Event
from dora_cli.allocation.budget import Target
from dora_cli.allocation.growth import component_cost, full_rank, hand_out, module_means
from dora_cli.allocation.schedules import Window
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict
from dora_cli.errors import UserError

SPARE_GATE = 1e-5


@dataclass
class Grow(Allocator):
    """At an event the modules with the best mean scores gain what the schedule allows, ``per_module`` each in turn.

    Advance learning: every module carries ``spares``, components whose factors train while their gate is held at 1e-5.
    Growth wakes a spare and adds a new one; at the end the spares are dropped. They are not alive, so they count for
    nothing and are not exported. Without gates there are none: components are added with no effect on the function.

    Under a budget of parameters, what does not suffice for the module whose turn it is waits for the next event; at
    the end it goes to the next best that fits.
    """

    interval: int | float = field(
        default=100, metadata={"help": "steps between events, or a share of the run", "above": 0}
    )
    start_rank: int = field(default=1, metadata={"help": "components per module at the start", "low": 1})
    per_module: int | None = field(
        default=None,
        metadata={"help": "ranks that a module gains in its turn; null: half the average asked for", "low": 1},
    )
    spares: int | None = field(
        default=None,
        metadata={
            "help": "components per module that train before they are needed; null: as many as per_module, if the "
            "adapter has gates",
            "low": 0,
        },
    )

    verbs: ClassVar[frozenset[str]] = frozenset({"grow", "drop"})
    mode: ClassVar[str] = "grow"
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.turn = self.per_module or 1
        if self.spares:  # asked for by number, so the adapter must have a gate to hold
            self.needs = frozenset({"gates"})  # type: ignore[misc]
            self.instead = f", or allocator.spares=0 instead of allocator.spares={self.spares}"

    def bounds(self, table: UnitTable, target: Target | None) -> tuple[int, int]:
        first, last = super().bounds(table, target)
        assert target is not None
        costs = [component_cost(layer) if target.by_cost else 1 for layer in table.layers]
        most = sum(full_rank(layer) * cost for layer, cost in zip(table.layers, costs, strict=True))
        if last > most:
            raise UserError(
                f"the budget asks for {last:,} {'parameters' if target.by_cost else 'components'}, more than these "
                f"{len(costs)} modules can use",
                where=f"at full rank, the smaller side of each, they have {most:,}",
                hint="set a smaller budget, or adapt more modules (adapter.targets)",
            )
        self.turn = self.per_module or max(1, round(last / sum(costs) / 2))
        return first, last

    def attach(self, table: UnitTable) -> None:
        self._restock(table, range(len(table.layers)), None)

    def after_backward(self, table: UnitTable, step: int, window: Window) -> None:
        """A held gate has no gradient, so it leaves no moments behind when it is woken."""
        for gates, spares in self._held(table):
            if gates.grad is not None:
                gates.grad.index_fill_(0, spares, 0.0)

    def after_step(self, table: UnitTable, step: int, window: Window, verdict: Verdict = TAKEN) -> None:
        """Weight decay and regularizers leave a held gate alone too."""
        for gates, spares in self._held(table):
            gates.detach().index_fill_(0, spares, SPARE_GATE)

    def act(self, event: Event) -> None:
        table = event.table
        left = event.limit - (table.alive_cost() if event.by_cost else table.alive_count())
        if left > 0:
            means = module_means(table, event.scores())
            best = sorted(range(len(means)), key=lambda m: (-means[m], m))
            waits = event.by_cost and not event.final
            shares = hand_out(table, best, left, by_cost=event.by_cost, at_once=self.turn, waits=waits)
            for module, n in shares.items():
                self._gain(table, module, n, event.optimizer)
            if not event.final:
                self._restock(table, shares, event.optimizer)
        if event.final:
            table.drop(table.spare)

    def _gain(self, table: UnitTable, module: int, n: int, optimizer: Optimizer | None) -> None:
        """Wake the module's oldest spares, and where they do not suffice, begin with new components."""
        rows = table.rows[module]
        woken = rows[table.spare[rows]][:n]
        table.wake(woken)
        if len(woken) < n:
            table.grow(module, n - len(woken), optimizer)

    def _restock(self, table: UnitTable, modules: Iterable[int], optimizer: Optimizer | None) -> None:
        """Give modules with gates as many spares as they may have, short of full rank."""
        wanted = self.turn if self.spares is None else self.spares
        for module in modules:
            layer, rows = table.layers[module], table.rows[module]
            spares, living = int(table.spare[rows].sum()), int(table.alive[rows].sum())
            missing = min(wanted, full_rank(layer) - living) - spares
            if missing > 0 and layer.valve == "c":
                table.grow(module, missing, optimizer, alive=False)
        for gates, positions in self._held(table):
            gates.detach().index_fill_(0, positions, SPARE_GATE)

    def _held(self, table: UnitTable) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(gates of a layer, positions of its spares), where there are any."""
        return ((getattr(table.layers[m], table.layers[m].valve), positions) for m, positions in table.spares())
