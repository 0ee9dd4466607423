"""PEFT's AdaLoRA procedure: its events, its truncated counts, its ties, its masks (METHODS 3, properties 2 to 4)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_cli.adapters.inject import parameter_groups
from dora_cli.adapters.svd import Svd
from dora_cli.allocation.allocators.prune import Prune
from dora_cli.allocation.allocators.prune_peft import PrunePeft
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.sensitivity import Sensitivity
from dora_cli.allocation.regularizers.orthogonal import Orthogonal
from dora_cli.allocation.schedules import CubicEarly, Linear, Schedule, Window
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError


def event_at(step: int, first: int, last: int, schedule: Schedule, window: Window, **more: Any) -> Any:
    """Of an event, what this allocator reads. The schedule's own count, which rounds, is not in it."""
    return SimpleNamespace(step=step, first=first, last=last, schedule=schedule, window=window, **more)


def acted(stack: Any, scores: list[float], step: int, schedule: Schedule, last: int, total: int = 10) -> list[bool]:
    """Which components live after one event at ``step`` under the given scores."""
    _, layers = stack(n=2, width=8, rank=len(scores) // 2, part=Svd())
    table, allocator = UnitTable(layers), PrunePeft()
    window = allocator.window(schedule, total)
    event = event_at(step, len(table), last, schedule, window, table=table, scores=lambda: torch.tensor(scores))
    allocator.act(event)
    gates = torch.cat([layer.c.detach() for layer in layers.values()])
    assert torch.equal(gates != 0, table.alive)
    return table.alive.tolist()


def test_events_fall_on_multiples_of_the_interval_inside_the_window_and_on_its_end() -> None:
    allocator = PrunePeft(interval=4)
    for start, events in ((7, [8, 12, 16, 18]), (8, [12, 16, 18])):  # the last step of the warm-up is none
        window = allocator.window(CubicEarly(start=start, end=18), 30)
        assert [t for t in range(1, 31) if allocator.is_event(t, window)] == events
    assert [t for t in range(14, 21) if allocator.observes(t, window)] == [14, 15, 16, 17]


def test_counts_are_pefts_to_the_last_truncation(stack: Any) -> None:
    """``budget_schedule`` of PEFT's RankAllocator, for many windows, beside our count."""
    layer = pytest.importorskip("peft.tuners.adalora.layer")
    peft = pytest.importorskip("peft")
    truncated = 0
    for total, t_init, t_final, first, last in ((100, 0, 0, 96, 64), (37, 5, 9, 50, 7), (64, 11, 3, 1000, 0)):
        theirs = object.__new__(layer.RankAllocator)
        theirs.init_bgt, theirs.target_bgt = first, last
        theirs.peft_config = peft.AdaLoraConfig(tinit=t_init, tfinal=t_final, total_step=total)
        schedule, allocator = CubicEarly(start=t_init, end=total - t_final), PrunePeft()
        window = allocator.window(schedule, total)
        previous = first
        for step in range(t_init + 1, total - t_final + 1):
            count = allocator._budget(event_at(step, first, last, schedule, window))
            assert count == theirs.budget_schedule(step)[0]
            assert last <= count <= previous
            previous = count
            truncated += count != schedule.count(step, window, first, last)
        assert previous == last
    assert truncated > 30, "rounding would have done as well: a test of nothing"


def test_another_schedule_is_followed_too(stack: Any) -> None:
    alive = acted(stack, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 5, Linear(start=0, end=10), last=2)
    assert alive == [False] * 3 + [True] * 5  # int(2 + 6 · ½)


def test_what_ties_with_the_threshold_goes_with_it(stack: Any) -> None:
    scores = [3.0, 1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 5.0]
    alive = acted(stack, scores, 10, CubicEarly(start=0, end=10), last=6)  # two should go; four tie with the second
    assert alive == [True, False, False, False, False, True, True, True]
    assert not any(acted(stack, [0.0] * 8, 10, CubicEarly(start=0, end=10), last=6))


def test_nothing_to_mask_is_no_error(stack: Any) -> None:
    assert all(acted(stack, [1.0] * 8, 10, CubicEarly(start=0, end=10), last=8))


def test_parameter_budgets_and_empty_windows_are_refused(stack: Any) -> None:
    _, layers = stack(n=2, part=Svd())
    with pytest.raises(UserError, match="prune_peft counts components"):
        PrunePeft().bounds(UnitTable(layers), Target(100, by_cost=True))
    with pytest.raises(UserError, match=r"before schedule\.end"):
        PrunePeft().window(CubicEarly(start=5, end=5), 10)


def run(stack: Any, allocator: Any, steps: int = 40) -> tuple[Allocation, list[dict[str, Any]]]:
    """Train a stack on noise. Returns the allocation, and per step: gates, the event, the rows of A."""
    model, layers = stack(n=4, width=12, rank=5, part=Svd(alpha=8.0), shake=False)
    allocation = Allocation(
        layers,
        schedule=CubicEarly(start=6, end=25),
        importance=Sensitivity(),
        allocator=allocator,
        regularizer=Orthogonal(weight=0.1),
        total_steps=steps,
        target=Target(9, by_cost=False),
    )
    optimizer = torch.optim.AdamW(parameter_groups(layers, lr=1e-2, weight_decay=0.01))
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(30, 12, generator=g), torch.randn(30, 12, generator=g)
    history = []
    for step in range(1, steps + 1):
        (model(x) - y).square().mean().backward()
        allocation.after_backward(step)
        optimizer.step()
        event = allocation.after_step(step, optimizer)
        optimizer.zero_grad()
        gates = torch.cat([layer.c.detach().clone() for layer in layers.values()])
        history.append({"gates": gates, "event": event, "a": [layer.a.detach().clone() for layer in layers.values()]})
    return allocation, history


def test_masks_return_before_the_end_and_never_after_while_rows_go_on_moving(stack: Any) -> None:
    allocation, history = run(stack, PrunePeft(interval=3))
    assert [i + 1 for i, h in enumerate(history) if h["event"]] == [9, 12, 15, 18, 21, 24, 25]
    closed = [int((h["gates"] == 0).sum()) for h in history]
    assert closed[8] > 0
    assert closed[9] == 0, "the step after an event, masked gates have moved"
    assert closed[24:] == [11] * 16  # 20 − 9, re-applied after every step
    final = history[24]["gates"] == 0
    assert all(torch.equal(h["gates"] == 0, final) for h in history[24:])
    assert allocation.alive_count() == 9
    assert not allocation.table.dropped.any()
    # Masked rows still feel the orthogonality term, as in PEFT, which takes nothing out of its tensors.
    masked = final[:5]
    assert all(len(layer.c) == 5 for layer in allocation.table.layers)
    assert bool((history[24]["a"][0] != history[39]["a"][0])[masked].any())


@pytest.mark.parametrize("allocator", [PrunePeft(interval=3), Prune(interval=3)], ids=["prune_peft", "prune"])
def test_open_gates_never_exceed_the_budget_after_an_event(stack: Any, allocator: Any) -> None:
    allocation, history = run(stack, allocator)
    counts = [(h["event"]["budget"], h["event"]["alive"], h["gates"]) for h in history if h["event"]]
    for budget, alive, gates in counts:
        assert int((gates != 0).sum()) <= alive <= budget
    budgets = [budget for budget, _, _ in counts]
    assert budgets == sorted(budgets, reverse=True)
    assert allocation.schedule.count(6, allocation.window, 20, 9) == 20
    assert int((history[24]["gates"] != 0).sum()) == budgets[-1] == 9


def test_scores_follow_a_permutation_of_the_components(stack: Any) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])

    def scored(permutation: torch.Tensor) -> torch.Tensor:
        _, layers = stack(n=1, width=8, rank=5, part=Svd())
        layer, table, importance = layers["0"], UnitTable(layers), Sensitivity()
        importance.attach(table)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, axis in layer.unit_axes.items():
                parameter = layer.get_parameter(name)
                parameter.copy_(parameter.index_select(axis, permutation))
        for step in (1, 2, 3):
            for name, axis in layer.unit_axes.items():
                parameter = layer.get_parameter(name)
                parameter.grad = torch.randn(parameter.shape, generator=g).index_select(axis, permutation)
            importance.update(table, step)
        return importance.scores(table, None)

    scores = scored(torch.arange(5))
    assert torch.allclose(scored(order), scores[order], rtol=1e-5)  # means are summed in another order
    assert len(scores.unique()) == 5
