"""``schedule=auto``: cuts are kept up to a known cliff, and what is put back is as it was, to the bit."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import parameter_groups
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.svd import Svd
from dora_cli.allocation.allocators.prune import Prune
from dora_cli.allocation.allocators.prune_principal import PrunePrincipal
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.base import Importance
from dora_cli.allocation.importance.energy import Energy
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import Auto
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError
from dora_cli.reporting.terminal import trial

SCORES = torch.rand(24, generator=torch.Generator().manual_seed(3))  # of 4 modules of rank 6


class Fixed(Importance):
    """The same scores for ever: the row's, whichever row that is by now."""

    def scores(self, table: UnitTable, probe: Any) -> Tensor:
        return SCORES


class Run:
    """A tiny regression, with a held-out loss that the test makes up. Events after every second step from 2 to 40.

    The loss before the first step is ``initial``.
    """

    def __init__(self, stack: Any, loss: Callable[[UnitTable], float], part: Any = None, **options: Any) -> None:
        self.model, self.layers = stack(n=4, width=8, rank=6, part=part)
        allocator, importance = options.pop("allocator", None), options.pop("importance", Fixed())
        given = {name: options.pop(name) for name in ("min_rank", "initial") if name in options}
        first = [loss for loss in [given.get("initial", 9.0)] if loss is not None]
        schedule = Auto(**{"start": 2, "end": 40, "cut": 0.25, "growth": 1.0, "patience": 9} | options)
        self.allocation = Allocation(
            self.layers,
            schedule=schedule,
            importance=importance,
            allocator=allocator or Prune(interval=2, min_rank=given.get("min_rank", 0)),
            regularizer=NoRegularizer(),
            total_steps=44,
            held_out=lambda: first.pop() if first else loss(self.allocation.table),
        )
        self.table = self.allocation.table
        groups = parameter_groups(self.layers, lr=1e-2, weight_decay=0.1)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.x, self.y = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(5))

    def backward(self, t: int) -> None:
        (self.model(self.x) - self.y).square().mean().backward()
        self.allocation.after_backward(t)
        self.optimizer.step()

    def events(self, first: int = 1, last: int = 44) -> Iterator[dict[str, Any]]:
        for t in range(first, last + 1):
            self.backward(t)
            event = self.allocation.after_step(t, self.optimizer)
            self.optimizer.zero_grad()
            if event is not None:
                yield event

    def units(self) -> dict[int, list[Tensor]]:
        """Row of the table → its values and moments, whatever its place in the tensors."""
        found: dict[int, list[Tensor]] = {}
        for layer, rows in zip(self.layers.values(), self.table.rows, strict=True):
            for place, row in enumerate(rows.tolist()):
                found[row] = []
                for name, axis in layer.unit_axes.items():
                    state = self.optimizer.state[getattr(layer, name)]
                    tensors = [getattr(layer, name).detach(), state["exp_avg"], state["exp_avg_sq"]]
                    found[row] += [tensor.select(axis, place).clone() for tensor in tensors]
        return found


def cliff(at: int) -> Callable[[UnitTable], float]:
    """1 while so many live, else 1.02."""
    return lambda table: 1.0 if table.alive_count() >= at else 1.02


def best(n: int) -> list[int]:
    return sorted(SCORES.argsort(descending=True)[:n].tolist())


def test_a_search_worked_by_hand(stack: Any) -> None:
    run = Run(stack, cliff(12), tolerance=0.01)
    events = list(run.events())
    seen = [(e["step"], e["auto"]["tried"], e["auto"]["committed"], e["auto"]["cut"], e["alive"]) for e in events]
    assert seen == [
        (2, 0, None, 0.25, 18),  # ⌈24/4⌉ on trial
        (4, 6, True, 0.25, 13),  # ⌈18/4⌉ = 5
        (6, 5, True, 0.25, 9),  # ⌈13/4⌉ = 4
        (8, 4, False, 0.25, 11),  # ⌈13/8⌉ = 2
        (10, 2, False, 0.125, 13),  # 13/16 is less than one: it waits for a loss that doesn't come
        *((t, 0, None, 0.25, 13) for t in range(12, 40, 2)),
        (40, 0, None, 0.25, 13),  # the final choice
    ]
    assert [e["budget"] for e in events] == [24, 18, 13, *[13] * 17]
    assert [e["auto"]["learned"] for e in events] == [True] * 4 + [False] * 16
    assert torch.nonzero(run.table.alive).flatten().tolist() == best(13)
    assert sum(layer.rank for layer in run.layers.values()) == 13  # and nothing of the others is left
    assert run.allocation.final_step == 40 and run.table.settled


@pytest.mark.parametrize("at", [1, 2, 7, 12, 19, 23, 24])
@pytest.mark.parametrize("growth", [1.0, 3.0])
def test_what_is_left_lies_on_the_cliff_and_never_rises(at: int, growth: float, stack: Any) -> None:
    run = Run(stack, cliff(at), tolerance=0.01, growth=growth, cut=0.1)
    before, cut, refused = 24, 0.1, 0
    for event in run.events():
        decision = event["auto"]
        assert decision["cut"] == cut
        assert event["budget"] == before - (decision["tried"] if decision["committed"] else 0) >= at
        if decision["tried"]:  # the loss alone decides, and it says whether the cut was too deep
            assert decision["committed"] == (before - decision["tried"] >= at)
            refused = 0 if decision["committed"] else refused + 1
            cut = max(cut, min(cut * growth, 0.25)) if decision["committed"] else cut / 2
            if refused and (refused == 9 or cut * before < 1):
                cut, refused = 0.1, 0
        before = event["budget"]
    assert torch.nonzero(run.table.alive).flatten().tolist() == best(before)
    # The last refused cut was of less than two components, or events ran out: 0.9ⁿ of 24 is 3 after 20.
    assert before <= at + 1 or growth == 1.0


@pytest.mark.parametrize("part", [Components(), Lora(), Svd()], ids=["components", "lora", "svd"])
def test_what_is_put_back_is_as_it_was_though_tensors_shrank_meanwhile(part: Any, stack: Any) -> None:
    losses = iter([1.0, 1.0, 5.0])  # nothing to decide; kept, a half, so that tensors shrink; put back
    run = Run(stack, lambda table: next(losses), part, cut=0.5)
    for _ in run.events(last=3):
        pass
    run.backward(4)
    before = run.units()
    assert run.allocation.after_step(4, run.optimizer) is not None
    trial = [row for row in best(12) if row not in best(6)]
    assert sum(layer.rank for layer in run.layers.values()) == 12
    assert torch.nonzero(run.table.alive).flatten().tolist() == best(6)
    run.optimizer.zero_grad()
    for t in (5, 6):
        for layer, places in run.table.positions(~run.table.alive):
            assert getattr(layer, layer.valve).detach().index_select(layer.unit_axes[layer.valve], places).eq(0).all()
        (run.model(run.x) - run.y).square().mean().backward()
        run.allocation.after_backward(t)
        for layer, places in run.table.positions(~run.table.alive):  # they weigh nothing in clipping
            for name, axis in layer.unit_axes.items():
                assert getattr(layer, name).grad.index_select(axis, places).eq(0).all()
        run.optimizer.step()
        drifted = run.units()
        event = run.allocation.after_step(t, run.optimizer)
    assert event is not None and event["auto"] == {
        "loss": 5.0, "best": 1.0, "tried": 6, "committed": False, "cut": 0.5, "initial": 9.0, "below": 9.0 - 0.02 * 9.0,
        "learned": True,
    }  # fmt: skip
    # At once a smaller cut is on trial: what is not in it is open again.
    after, again = run.units(), [row for row in trial if bool(run.table.alive[row])]
    assert len(again) == 3
    for row in again:
        assert all(map(torch.equal, after[row], before[row]))
        assert not all(map(torch.equal, drifted[row], before[row]))  # moments and decay had moved on
    survivor = best(6)[0]
    assert all(map(torch.equal, after[survivor], drifted[survivor]))


def test_of_turned_components_the_cut_ones_come_back_as_what_they_were_turned_into(stack: Any) -> None:
    losses = iter([1.0, 5.0])
    turned = {"allocator": PrunePrincipal(interval=2), "importance": Energy()}
    run = Run(stack, lambda table: next(losses), Lora(), patience=1, cut=0.5, end=5, **turned)

    def deltas() -> list[Tensor]:
        return [layer.delta_weight().detach().double() for layer in run.layers.values()]

    run.backward(1)
    run.optimizer.zero_grad()
    run.backward(2)
    whole = deltas()
    assert run.allocation.after_step(2, run.optimizer) is not None  # turns, and cuts a half for a trial
    left = deltas()
    cut = [delta - other for delta, other in zip(whole, left, strict=True)]
    run.optimizer.zero_grad()
    # The best half of all: no cut to as many components is nearer, and what is cut stands square to what is left.
    spectra = torch.cat([torch.linalg.svdvals(delta) for delta in whole]).sort(descending=True).values
    assert sum(delta.square().sum() for delta in cut) == pytest.approx(float(spectra[12:].square().sum()), rel=1e-4)
    for one, other in zip(cut, left, strict=True):
        assert (one * other).sum().abs() < 1e-6 * other.square().sum() + 1e-12
    for t in (3, 4):
        run.backward(t)
        run.allocation.allocator.after_step(run.table, t, run.allocation.window)  # else moments have opened them a bit
        trained = deltas()
        event = run.allocation.after_step(t, run.optimizer)
        run.optimizer.zero_grad()
    assert event is not None and event["auto"]["committed"] is False and event["alive"] == 24
    for now, other, missed in zip(deltas(), trained, cut, strict=True):
        assert torch.allclose(now, other + missed, rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(other, kept) for other, kept in zip(trained, left, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_over_any_tolerance(bad: float, stack: Any) -> None:
    losses = iter([1.0, bad, 1.0] + [1.0] * 30)
    events = list(Run(stack, lambda table: next(losses), tolerance=0.8).events(last=6))
    assert [e["auto"]["committed"] for e in events] == [None, False, True]
    assert events[-1]["auto"]["best"] == 1.0


def test_where_the_loss_of_an_event_is_no_number_nothing_is_tried_after_it(stack: Any) -> None:
    losses = iter([math.nan] + [1.0] * 30)
    events = list(Run(stack, lambda table: next(losses), tolerance=0.0).events(last=8))
    assert [e["auto"]["committed"] for e in events] == [None, None, True, True]


def test_the_best_only_falls_so_that_steps_within_the_tolerance_do_not_add_up(stack: Any) -> None:
    losses = iter([1.0, 0.9, 0.99, 1.0, *[1.0] * 30])  # a tenth above 0.9 is 0.99
    events = list(Run(stack, lambda table: next(losses), tolerance=0.1).events(last=8))
    assert [e["auto"]["committed"] for e in events] == [None, True, True, False]
    assert [e["auto"]["best"] for e in events] == [1.0, 0.9, 0.9, 0.9]


@pytest.mark.parametrize("initial", [0.5, 1.0, 1.01, math.nan])
def test_nothing_is_tried_before_something_is_learned(initial: float, stack: Any) -> None:
    """A loss that falls late, from 1 to 0.9 at step 20; and one that never falls."""
    losses = iter([1.0] * 9 + [0.9] * 30)
    events = list(Run(stack, lambda table: next(losses), tolerance=0.05, initial=initial).events())
    tries = [event["step"] for event in events if event["alive"] < 24]
    if initial == 0.5:
        assert tries == [] and events[-1]["budget"] == 24 and not events[-1]["auto"]["learned"]
    else:
        assert tries[0] == (2 if math.isnan(initial) else 20)
        assert events[-1]["budget"] < 24


def test_patience_floor_and_least_ranks_end_it(stack: Any) -> None:
    refused = iter([1.0] + [2.0] * 30)
    run = Run(stack, lambda table: next(refused), patience=2, cut=0.5)
    assert [e["step"] for e in run.events() if e["auto"]["tried"]] == [4, 6]
    assert run.allocation.alive_count() == 24
    run = Run(stack, lambda table: 1.0, floor=10)
    assert [e["budget"] for e in run.events()][-1] == 10
    run = Run(stack, lambda table: 1.0, min_rank=2, cut=0.5)
    last = list(run.events())[-1]
    assert list(last["ranks"].values()) == [2, 2, 2, 2]
    with pytest.raises(UserError, match="nothing to prune: the adapter starts with 24") as caught:
        Run(stack, lambda table: 1.0, floor=24)
    assert caught.value.where is not None and "schedule.floor=24" in caught.value.where


def test_a_search_that_gave_up_goes_on_when_the_loss_has_fallen_by_the_tolerance(stack: Any) -> None:
    """A lucky 0.5 at the first event, which no cut could hold, however small."""
    losses = iter([0.5, 1.0, 1.0, 0.6, 0.46, 0.45, 0.4, *[0.4] * 30])
    run = Run(stack, lambda table: next(losses), patience=2, tolerance=0.1, cut=0.25)
    events = list(run.events(last=16))
    assert [e["auto"]["committed"] for e in events] == [None, False, False, None, None, None, None, True]
    assert [e["auto"]["learned"] for e in events] == [True, True, False, False, False, False, True, True]
    assert [e["auto"]["below"] for e in events] == [pytest.approx(8.1)] * 2 + [pytest.approx(0.45)] * 6
    assert events[-1]["auto"]["tried"] == 6 and events[-1]["auto"]["cut"] == 0.25  # as large as at first
    assert [e["budget"] for e in events] == [24] * 7 + [18]


def test_the_plan_says_the_fastest_way_and_long_windows_have_few_events(stack: Any) -> None:
    run = Run(stack, lambda table: 1.0, growth=1.5, cut=0.1, floor=3)
    steps = [t for t in range(1, 45) if run.allocation.is_event(t)]
    planned = run.allocation.counts(steps)
    events = {event["step"]: event["alive"] for event in run.events()}
    assert [events.get(t, 3) for t in steps] == planned and planned[-1] == 3
    for total in (50, 51, 997, 10_000):
        schedule = Auto(start=10, end=total, events=12)
        window = schedule.window(total)
        spacing = schedule.spacing(1, window)
        assert len({*range(10, total, spacing), total}) <= 12
        assert schedule.spacing(total, window) == total


@pytest.mark.parametrize("last", [9, 15], ids=["in a trial", "waiting"])
def test_a_search_goes_on_where_its_state_was_taken(last: int, stack: Any) -> None:
    """After a cut was put back; parameters and moments go their own way (tests/training)."""
    whole = Run(stack, cliff(12), tolerance=0.01)
    ends = [event["auto"] for event in whole.events()]
    cut = Run(stack, cliff(12), tolerance=0.01)
    list(cut.events(last=last))
    state, trials = cut.allocation.state_dict(), cut.allocation.allocator
    again = Run(stack, cliff(12), tolerance=0.01, initial=None)  # none is asked for any more
    again.allocation.load_state_dict(state)
    fresh = again.allocation.allocator.state_dict()
    assert fresh.keys() == trials.state_dict().keys()
    assert any(key.startswith("copy|") and key.endswith("c.exp_avg") for key in fresh) == (last == 9)
    assert [event["auto"] for event in again.events(first=last + 1)] == ends[(last - 1) // 2 :]


def test_a_search_of_an_older_state_that_gave_up_goes_on(stack: Any) -> None:
    """It said `done` of that, and had no `below`."""
    run = Run(stack, lambda table: 1.0, cut=0.25)
    list(run.events(last=3))
    run.backward(4)
    state = run.allocation.state_dict()
    state["allocator"] = {k: v for k, v in state["allocator"].items() if k not in ("below", "at_floor")} | {"done": 1}
    again = Run(stack, lambda table: 1.0, cut=0.25, initial=None)
    again.allocation.load_state_dict(state)
    assert [event["auto"]["committed"] for event in again.events(first=4, last=6)] == [True, True]
    assert again.allocation.allocator.state_dict()["below"] == pytest.approx(9.0 * 0.98)


def test_the_line_of_a_decision_says_that_it_waits() -> None:
    decision = {
        "loss": 0.5,
        "best": 0.4,
        "tried": 3,
        "committed": False,
        "initial": 0.7,
        "below": 0.39,
        "learned": False,
    }
    assert trial(decision) == "cut of 3 undone: held-out loss 0.5, best 0.4; waits for 0.39"
    assert trial(decision | {"learned": True}) == "cut of 3 undone: held-out loss 0.5, best 0.4"
    none = decision | {"tried": 0, "committed": None}
    assert trial(none) == "nothing tried before the held-out loss is below 0.39: 0.5"
    assert (
        trial(none | {"learned": True})
        == trial(none | {"below": None})
        == "no cut to decide: held-out loss 0.5, best 0.4"
    )
