"""One flat table of units over all modules: module, order within it, cost, and whether each lives.

The table is what allocators and importances see; it passes their verbs on to the layers and never looks at a layer's
type. Unit identity is the row in this table, which never changes: layers may be compacted and grown under it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dora_cli.adapters.base import AdapterLayer, LowRankLayer, WholeModule
from dora_cli.adapters.inject import regroup
from dora_cli.adapters.principal import turn_to_principal
from dora_cli.adapters.resize import check_state, discard, resize
from dora_cli.errors import UserError

COLUMNS = ("module", "order", "cost", "alive", "dropped", "frozen", "spare")
ResizeListener = Callable[[int, Tensor, int], None]  # module, positions kept, units appended


@dataclass(frozen=True)
class Group:
    """Layers of one shape, for batched arithmetic.

    ``modules`` are their positions in the table's module list; ``index`` (m, r) on the layers' device says which table
    row each of their units is; ``kept`` (m, r) is 0 for dropped units whose rows are still there, None where there are
    none.
    """

    layers: tuple[LowRankLayer, ...]
    modules: tuple[int, ...]
    index: Tensor
    kept: Tensor | None = None
    packs: "dict[str, Pack]" = field(default_factory=dict)

    def parameters(self, name: str) -> Sequence[nn.Parameter]:
        """The layers' parameters called ``name``; a group never outlives them."""
        return self._pack(name).parameters

    def stack(self, name: str) -> Tensor:
        """(m, …) the same, in one tensor and without graph: to be read, not to be written to."""
        return self._pack(name).values

    def _pack(self, name: str) -> "Pack":
        pack = self.packs.get(name)
        if pack is None or not pack.is_valid():
            pack = self.packs[name] = Pack([getattr(layer, name) for layer in self.layers])
        return pack

    def gates(self) -> Tensor:
        """(m, r) the gate of every component, 1 where the parametrisation has none."""
        kind = type(self.layers[0])
        if kind.gates is LowRankLayer.gates and "c" in kind.unit_axes:
            return self.stack("c")
        return torch.stack([layer.gates().detach() for layer in self.layers])

    def factors(self) -> tuple[Tensor, Tensor]:
        """(m, r, d_in) and (m, d_out, r): the factors as they act on the layers' spaces, without gates and scale."""
        if type(self.layers[0]).factors is LowRankLayer.factors:
            return self.stack("a"), self.stack("b")
        pairs = [layer.factors() for layer in self.layers]
        return torch.stack([a.detach() for a, _ in pairs]), torch.stack([b.detach() for _, b in pairs])


class Pack:
    """Parameters of one shape moved into one tensor: stacked once, read at every step without a copy.

    The parameters stay what they are to everybody else; only where their numbers lie has changed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.values = torch.stack([p.detach() for p in parameters])
        for parameter, values in zip(parameters, self.values.unbind(0), strict=True):
            parameter.data = values
        self.places = [p.data_ptr() for p in parameters]

    def is_valid(self) -> bool:
        """Whether the parameters' numbers still lie here: moving a model, say, puts them elsewhere."""
        return self.places == [p.data_ptr() for p in self.parameters]


class UnitTable:
    """All units of an adapted model.

    Args:
        layers: full module name → layer, in module order.
        kind: ``components`` or ``tensors``, as the layers have them, or ``modules``: each layer is one unit.

    Attributes:
        module, order, cost: (n,) int64, on the CPU.
        alive: (n,) bool, kept at the last event (all, before the first).
        dropped: (n,) bool, gone for good.
        frozen: (n,) bool, no longer trained.
        spare: (n,) bool, trains already but does not live yet; counts for nothing until it is woken.
        rows: per module, which table row each physical unit of its layer is.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], kind: str = "components") -> None:
        self.kind = kind
        self.version = 0  # counts changes of shape
        self._groups: list[Group] | None = None
        self._dead: list[tuple[int, Tensor]] | None = None
        self._spares: list[tuple[int, Tensor]] | None = None
        self.names = list(layers)
        self.layers = list(layers.values())
        # What the verbs go to: the layers, or a view of each as a single unit.
        self.owners: list[Any] = [WholeModule(layer) if kind == "modules" else layer for layer in self.layers]
        self.module = self.order = self.cost = torch.empty(0, dtype=torch.long)
        self.alive = self.dropped = self.frozen = self.spare = torch.empty(0, dtype=torch.bool)
        self.rows: list[Tensor] = []
        self.compactions = 0
        self.settled = False  # the final choice is made
        self.listeners: list[ResizeListener] = []
        self.on_empty: Callable[[str], None] | None = None  # called with a module that can never live again
        for m, owner in enumerate(self.owners):
            self.rows.append(self._append(m, owner.unit_costs()))
            self.frozen[self.rows[m]] = torch.tensor(owner.frozen_units(), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.module)

    # ---- reading -------------------------------------------------------------------------------------------------
    def ranks(self) -> dict[str, int]:
        """Living units per module, modules without any included."""
        counts = torch.bincount(self.module[self.alive], minlength=len(self.layers)).tolist()
        return dict(zip(self.names, counts, strict=True))

    def contributing(self) -> Tensor:
        """(n,) bool: units that live and that their layer's own gates let through."""
        mask = self.alive.clone()
        if self.kind == "components":
            for layer, rows in zip(self.layers, self.rows, strict=True):
                mask[rows] &= layer.open_units()
        return mask

    def alive_count(self) -> int:
        return int(self.alive.sum())

    def alive_cost(self) -> int:
        return int(self.cost[self.alive].sum())

    def groups(self) -> list[Group]:
        """Layers of components grouped by shape; made anew only after a change of shape."""
        if self._groups is None:
            by_shape: dict[tuple[object, ...], list[int]] = {}
            for m, layer in enumerate(self.layers):
                if isinstance(layer, LowRankLayer) and layer.rank > 0:
                    by_shape.setdefault((type(layer), layer.d_in, layer.d_out, layer.rank), []).append(m)
            self._groups = [self._group(modules) for modules in by_shape.values()]
        return self._groups

    def dead(self) -> list[tuple[int, Tensor]]:
        """(module, physical positions) of dropped units that still have rows; looked up only after a change."""
        if self._dead is None:
            self._dead = list(self._positions(self.dropped))
        return self._dead

    def spares(self) -> list[tuple[int, Tensor]]:
        """(module, physical positions) of spare units; looked up only after a change."""
        if self._spares is None:
            self._spares = list(self._positions(self.spare))
        return self._spares

    @contextmanager
    def only(self, mask: Tensor) -> Iterator[None]:
        """Within, only the units of ``mask`` (n,) take part. Changes no parameter, random or optimizer state."""
        layers = [(m, layer) for m, layer in enumerate(self.layers) if isinstance(layer, LowRankLayer)]
        try:
            for m, layer in layers:
                layer.probe_mask = mask[self.rows[m]].to(layer.a)
            yield
        finally:
            for _, layer in layers:
                layer.probe_mask = None

    # ---- verbs ---------------------------------------------------------------------------------------------------
    def keep(self, mask: Tensor, *, final: bool) -> None:
        """Of the units not dropped, exactly those of ``mask`` (n,) live; others are silenced, or dropped if final."""
        closing = ~mask & ~self.dropped
        self.alive = mask & ~self.dropped
        if final:
            self.drop(closing)
            return
        for m, positions in self._positions(closing):
            self.owners[m].silence(positions)

    def drop(self, mask: Tensor) -> None:
        """Drop the units of ``mask`` at once; the others stay as they are."""
        closing = mask & ~self.dropped
        self.alive, self.spare = self.alive & ~closing, self.spare & ~closing
        self.dropped = self.dropped | closing
        self._changed()
        for m, positions in self._positions(closing):
            self.owners[m].silence(positions)

    def settle(self) -> None:
        """The final choice is made; whatever is stochastic about which components take part ends."""
        self.settled = True
        if self.kind == "components":
            for layer in self.layers:
                layer.settle()

    def freeze(self, mask: Tensor, optimizer: Optimizer | None = None) -> None:
        """Stop training the units of ``mask``. Given the optimizer, they leave it, moments and all."""
        for m, positions in self._positions(mask & ~self.frozen):
            self.owners[m].freeze(positions)
            if optimizer is not None:
                discard([p for p in self.layers[m].adapter_parameters().values() if not p.requires_grad], optimizer)
        self.frozen = self.frozen | mask

    def thaw(self, mask: Tensor, optimizer: Optimizer | None = None) -> None:
        """Let the units of ``mask`` train again; they find back into the optimizer."""
        for m, positions in self._positions(mask & self.frozen):
            self.owners[m].thaw(positions)
        self.frozen = self.frozen & ~mask
        if optimizer is not None:
            regroup(self.by_name(), optimizer)

    def turn(self, optimizer: Optimizer | None, agree: Callable[[Tensor], Tensor]) -> None:
        """Make what is not dropped of every module its principal components, in place: another basis of one update."""
        units = ((self.layers[m], positions) for m, positions in self._positions(~self.dropped))
        turn_to_principal(units, optimizer, agree)  # type: ignore[arg-type]

    def switch(self, mask: Tensor) -> None:
        """Of units that are modules, exactly those of ``mask`` contribute; the others are off, and may return."""
        for m, _ in self._positions(~mask & self.alive):
            self.owners[m].silence(None)
        for m, _ in self._positions(mask & ~self.alive):
            self.owners[m].restore(None)
        self.alive = mask.clone()

    def grow(self, module: int, n: int, optimizer: Optimizer | None = None, *, alive: bool = True) -> Tensor:
        """Add ``n`` units to a module that leave the function as it is; returns their table rows.

        Units that are not ``alive`` yet train beside the others and count for nothing until they are woken.
        """
        layer = self.layers[module]
        self._resize(module, torch.arange(len(self.rows[module])), n, optimizer)
        new = self._append(module, layer.unit_costs()[-n:])
        self.rows[module] = torch.cat([self.rows[module], new])
        self.alive[new], self.spare[new] = alive, not alive
        if optimizer is not None:  # a module that had nothing had left it
            regroup(self.by_name(), optimizer)
        return new

    def wake(self, rows: Tensor) -> None:
        """Units that were grown before their time live from now on."""
        self.alive = self.alive.index_fill(0, rows, True)
        self.spare = self.spare.index_fill(0, rows, False)
        self._changed()

    def by_name(self) -> dict[str, AdapterLayer]:
        return dict(zip(self.names, self.layers, strict=True))

    def positions(self, mask: Tensor) -> Iterator[tuple[AdapterLayer, Tensor]]:
        """(layer, physical positions of the masked units, on its device) for the layers that have any."""
        return ((self.layers[m], positions) for m, positions in self._positions(mask))

    def hold(self) -> None:
        """Keep dropped units closed that still have rows; after every optimizer step."""
        for m, positions in self.dead():
            self.layers[m].silence(positions)

    def mute(self) -> None:
        """Zero the gradients of dropped units, so that they weigh nothing in clipping; before clipping."""
        for m, positions in self.dead():
            self.layers[m].mute_gradient(positions)

    def dead_share(self) -> float:
        """Share of physical rows that belong to dropped units."""
        total = sum(len(rows) for rows in self.rows)
        return sum(len(positions) for _, positions in self.dead()) / total if total else 0.0

    def compact(self, optimizer: Optimizer | None = None) -> bool:
        """Rebuild tensors without the rows of dropped units; exact. Returns whether anything changed."""
        dead = self.dead()
        for m, _ in dead:
            living = torch.nonzero(~self.dropped[self.rows[m]]).flatten()
            self._resize(m, living, 0, optimizer)
            self.rows[m] = self.rows[m][living]
            if len(living) == 0:
                self._empty(m, optimizer)
        if dead and optimizer is not None:
            check_state(optimizer)
        self.compactions += bool(dead)
        return bool(dead)

    # ---- state ---------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        tensors = {k: getattr(self, k) for k in COLUMNS}
        numbers = {"compactions": self.compactions, "settled": int(self.settled)}
        return {"names": self.names} | tensors | numbers | {f"rows.{m}": rows for m, rows in enumerate(self.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved table, giving each layer the physical rows it had then (values are loaded elsewhere)."""
        if state["names"] != self.names:
            raise UserError(
                "the checkpoint has adapters on other modules than this run",
                where=f"{len(state['names'])} modules then, {len(self.names)} now, not all of them the same",
                hint="a start that looks at data (adapter.init=eva) may move ranks on another machine: resume on one "
                "like the first, or begin anew",
            )
        for m in range(len(self.layers)):
            rows = state[f"rows.{m}"]
            kept = torch.arange(min(len(rows), len(self.rows[m])))
            if len(rows) != len(self.rows[m]):
                self._resize(m, kept, len(rows) - len(kept), None)
            self.rows[m] = rows
            if len(rows) == 0:
                self._empty(m, None)
        for k in COLUMNS:
            setattr(self, k, state[k])
        self.compactions = int(state["compactions"])
        for m, positions in self._positions(self.frozen):
            self.owners[m].freeze(positions)
        if self.kind == "modules":
            for m, _ in self._positions(~self.alive):
                self.owners[m].silence(None)
        if state["settled"]:
            self.settle()
        self._changed()

    # ---- inside --------------------------------------------------------------------------------------------------
    def _append(self, module: int, costs: list[int]) -> Tensor:
        first, n = len(self.module), len(costs)
        born = int((self.module == module).sum())
        self.module = torch.cat([self.module, torch.full((n,), module)])
        self.order = torch.cat([self.order, torch.arange(born, born + n)])
        self.cost = torch.cat([self.cost, torch.tensor(costs, dtype=torch.long)])
        self.alive = torch.cat([self.alive, torch.ones(n, dtype=torch.bool)])
        self.dropped = torch.cat([self.dropped, torch.zeros(n, dtype=torch.bool)])
        self.frozen = torch.cat([self.frozen, torch.zeros(n, dtype=torch.bool)])
        self.spare = torch.cat([self.spare, torch.zeros(n, dtype=torch.bool)])
        self._changed()
        return torch.arange(first, first + n)

    def _empty(self, module: int, optimizer: Optimizer | None) -> None:
        """Nothing lives in a module any more: where nothing else of it matters, it is its base layer again."""
        if not self.layers[module].removable:
            return
        if optimizer is not None:
            discard(list(self.layers[module].adapter_parameters().values()), optimizer)
        if self.on_empty is not None:
            self.on_empty(self.names[module])

    def _resize(self, module: int, keep: Tensor, n_new: int, optimizer: Optimizer | None) -> None:
        resize(self.layers[module], keep, n_new, optimizer)
        for listener in self.listeners:
            listener(module, keep, n_new)
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._groups = self._dead = self._spares = None

    def _group(self, modules: list[int]) -> Group:
        layers = [self.layers[m] for m in modules]
        device = next(layers[0].parameters()).device
        index = torch.stack([self.rows[m] for m in modules])
        dropped = self.dropped[index]
        kept = (~dropped).float().to(device) if bool(dropped.any()) else None
        return Group(tuple(layers), tuple(modules), index.to(device), kept)  # type: ignore[arg-type]

    def _positions(self, mask: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(module, physical positions of the masked units) for the modules that have any."""
        for m, rows in enumerate(self.rows):
            positions = torch.nonzero(mask[rows]).flatten()
            if len(positions):
                device = next(self.layers[m].parameters()).device
                yield m, positions.to(device)
