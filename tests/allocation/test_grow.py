"""IncreLoRA's growth: who gains, that counts follow the schedule to the budget, and what spares are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_cli.adapters import ADAPTERS
from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.mora_components import MoraComponents
from dora_cli.adapters.svd import Svd
from dora_cli.adapters.weight_decomposed import WeightDecomposed
from dora_cli.allocation import ALLOCATORS, IMPORTANCES, SCHEDULES, rules
from dora_cli.allocation.allocators.grow import SPARE_GATE, Grow
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.growth import component_cost, full_rank, hand_out
from dora_cli.allocation.importance.ablation import Ablation
from dora_cli.allocation.importance.module_sensitivity import ModuleSensitivity
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.importance.sensitivity import Sensitivity
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.regularizers.orthogonal import Orthogonal
from dora_cli.allocation.schedules import Linear, OneShot
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError
from dora_cli.registry import load


class OfModules(Random):
    """A score for every module, the same for each of its components."""

    values: tuple[float, ...]

    def scores(self, table: UnitTable, probe: Any) -> Tensor:
        return torch.tensor(self.values)[table.module]


class Run:
    """A tiny regression trained with growth, one step at a time."""

    def __init__(
        self, model: nn.Module, layers: Any, target: int, *, by_cost: bool = False, decay: float = 0.1, **parts: Any
    ) -> None:
        self.model, self.layers = model, layers
        defaults = {
            "schedule": Linear(start=10, end=50),
            "importance": Random(),
            "allocator": Grow(interval=10),
            "regularizer": NoRegularizer(),
            "total_steps": 60,
        }
        self.allocation = Allocation(layers, target=Target(target, by_cost=by_cost), **{**defaults, **parts})
        self.table = self.allocation.table
        self.optimizer = torch.optim.AdamW(parameter_groups(layers, lr=1e-2, weight_decay=decay), fused=True)
        g = torch.Generator().manual_seed(5)
        self.x = torch.randn(24, next(iter(layers.values())).d_in, generator=g)

    def step(self, t: int) -> dict[str, Any] | None:
        (self.model(self.x) - 1).square().mean().backward()
        self.allocation.after_backward(t)
        self.optimizer.step()
        event = self.allocation.after_step(t, self.optimizer)
        self.optimizer.zero_grad()
        return event


def uneven(part: Any, ranks: list[int], *, seed: int = 0) -> tuple[nn.Module, Any]:
    """Modules of costs 12, 28 and 28 and full ranks 4, 4 and 4."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 24), nn.Linear(24, 4)).requires_grad_(False)
    return model, inject(model, ["0", "1", "2"], part, ranks)


# ---- who gains -------------------------------------------------------------------------------------------------------
def test_modules_gain_in_turn_the_best_first_and_no_more_than_they_can_use() -> None:
    table = UnitTable(uneven(Lora(), [1, 1, 1])[1])
    assert hand_out(table, [1, 2, 0], 4, by_cost=False, at_once=2) == {1: 2, 2: 2}
    assert hand_out(table, [1, 2, 0], 3, by_cost=False, at_once=2) == {1: 2, 2: 1}
    assert hand_out(table, [1, 2, 0], 8, by_cost=False, at_once=2) == {1: 3, 2: 3, 0: 2}  # a second turn
    assert hand_out(table, [1, 2, 0], 99, by_cost=False, at_once=2) == {1: 3, 2: 3, 0: 3}
    assert hand_out(table, [], 4, by_cost=False) == {}


def test_under_a_budget_of_parameters_the_dear_module_waits_for_its_turn_until_the_end() -> None:
    table = UnitTable(uneven(Lora(), [1, 1, 1])[1])
    assert [component_cost(layer) for layer in table.layers] == [12, 28, 28]
    assert hand_out(table, [0, 1, 2], 39, by_cost=True, waits=True) == {0: 1}  # 27 are left, and wait
    assert hand_out(table, [0, 1, 2], 40, by_cost=True, waits=True) == {0: 1, 1: 1}
    assert hand_out(table, [0, 1, 2], 39, by_cost=True) == {0: 3}  # at the end, whoever fits


def test_the_square_of_mora_components_bounds_its_rank_and_sets_its_cost() -> None:
    torch.manual_seed(0)
    layer = MoraComponents(square_rank=1).layer(nn.Linear(20, 16), 1)
    assert (full_rank(layer), component_cost(layer)) == (layer.side, layer.unit_costs()[0])  # type: ignore[attr-defined]


def test_an_event_gives_the_best_modules_what_the_schedule_allows(stack: Any) -> None:
    model, layers = stack(n=4, rank=1, part=Svd())
    scores = OfModules()
    scores.values = (0.1, 0.4, 0.2, 0.3)
    run = Run(model, layers, 16, importance=scores, allocator=Grow(interval=10, per_module=2))
    events = [event["ranks"] for t in range(1, 51) if (event := run.step(t))]
    assert events[0] == {"0": 1, "2": 1, "4": 1, "6": 1}  # step 10: the schedule starts
    assert events[1] == {"0": 1, "2": 3, "4": 1, "6": 2}  # three more: two for the best, one for the next
    assert events[2] == {"0": 1, "2": 5, "4": 1, "6": 3}
    assert events[-1] == {"0": 1, "2": 9, "4": 1, "6": 5}


def test_a_module_without_a_number_comes_last(stack: Any) -> None:
    model, layers = stack(n=3, rank=1, part=Svd())
    scores = OfModules()
    scores.values = (float("nan"), 0.0, -1.0)
    run = Run(model, layers, 5, importance=scores, schedule=OneShot(end=3), allocator=Grow(per_module=1))
    for t in range(1, 4):
        run.step(t)
    assert list(run.table.ranks().values()) == [1, 2, 2]


def test_half_the_average_asked_for_is_the_published_turn(stack: Any) -> None:
    for average, turn in ((2, 1), (4, 2), (6, 3), (8, 4)):
        allocator = Grow()
        Run(*stack(n=4, rank=1, part=Svd()), 4 * average, allocator=allocator)
        assert allocator.turn == turn
        Run(*stack(n=4, rank=1, part=Svd()), 4 * average * 32, by_cost=True, allocator=(by_cost := Grow()))
        assert by_cost.turn == turn


# ---- counts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [n for n in SCHEDULES if load(SCHEDULES, n, key="").moves and n != "auto"])
@pytest.mark.parametrize("part", [Svd, Lora])
def test_every_moving_schedule_is_followed_to_exactly_the_budget(stack: Any, schedule: str, part: Any) -> None:
    run = Run(
        *stack(n=4, rank=2, width=16, part=part()),
        27,
        schedule=load(SCHEDULES, schedule, key="")(end=23, **({} if schedule == "one_shot" else {"start": 5})),
        allocator=Grow(interval=4, per_module=2),
    )
    alive = [8]
    for t in range(1, 31):
        event = run.step(t)
        if event:
            limit = run.allocation.schedule.count(t, run.allocation.window, 8, 27)
            assert event["alive"] == event["budget"] == limit == sum(event["ranks"].values())
            alive.append(event["alive"])
    assert alive == sorted(alive)
    assert alive[-1] == 27 == run.allocation.alive_count()
    assert sum(layer.rank for layer in run.layers.values()) == 27  # and nothing else is left in the tensors


@pytest.mark.parametrize("limit", [131, 140, 203, 271, 272])
def test_a_budget_of_parameters_is_never_exceeded_and_met_as_far_as_components_go(limit: int) -> None:
    model, layers = uneven(Components(), [1, 1, 1])
    run = Run(model, layers, limit, by_cost=True, allocator=Grow(interval=5, per_module=1))
    for t in range(1, 51):
        event = run.step(t)
        if event:
            assert event["params"] <= event["budget"] <= limit
    table = run.table
    room = [component_cost(la) for la, r in zip(table.layers, table.ranks().values(), strict=True) if r < full_rank(la)]
    assert limit - table.alive_cost() < min(room, default=1)


def test_at_an_event_before_the_end_a_cheaper_module_does_not_take_what_a_better_one_saves_for() -> None:
    model, layers = uneven(Lora(), [1, 1, 1])  # 68 parameters; a component costs 12, 28, 28
    scores = OfModules()
    scores.values = (0.2, 0.3, 0.1)
    run = Run(model, layers, 108, by_cost=True, importance=scores, allocator=Grow(interval=10, per_module=1))
    ranks = [list(event["ranks"].values()) for t in range(1, 51) if (event := run.step(t))]
    # limits 68, 78, 88, 98, 108: the best module waits until 28 are there; at the end 12 are left for the cheap one
    assert ranks == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 2, 1], [2, 2, 1]]


def test_a_budget_beyond_full_rank_is_refused_and_full_rank_is_reached() -> None:
    model, layers = uneven(Svd(), [1, 1, 1])
    with pytest.raises(UserError, match="13 components, more than these 3 modules can use"):
        Run(model, layers, 13)
    with pytest.raises(UserError, match="273 parameters"):
        Run(model, layers, 273, by_cost=True)
    run = Run(model, layers, 12)
    for t in range(1, 51):
        run.step(t)
    assert list(run.table.ranks().values()) == [4, 4, 4]


def test_what_is_counted_before_training_leaves_spares_out(stack: Any) -> None:
    run = Run(*stack(n=3, rank=1, part=Svd()), 12, allocator=Grow(spares=3))
    assert [layer.rank for layer in run.layers.values()] == [4, 4, 4]
    assert (run.allocation.start_count, run.allocation.first, run.allocation.last) == (3, 3, 12)
    assert run.allocation.alive_count() == 3 and run.table.alive_cost() == 3 * 32
    assert run.allocation.most_count == 12
    assert list(run.table.ranks().values()) == [1, 1, 1]


# ---- spares ----------------------------------------------------------------------------------------------------------
def gates_of_spares(run: Run) -> Tensor:
    return torch.cat([run.table.layers[m].c.detach()[positions] for m, positions in run.table.spares()])


@pytest.mark.parametrize("part", [lambda: Svd(decay_gates=True), lambda: Components(decay_gates=True), MoraComponents])
def test_spares_train_while_their_gate_is_held_and_go_at_the_end(stack: Any, part: Callable[[], Any]) -> None:
    run = Run(*stack(n=3, rank=1, part=part()), 15, allocator=Grow(interval=10, spares=2), decay=0.5)
    layer = run.layers["0"]
    start = layer.a.detach()[1:].clone()
    for t in range(1, 50):
        run.step(t)
        assert int(run.table.spare.sum()) == 6
        assert torch.equal(gates_of_spares(run), torch.full((6,), SPARE_GATE))
        if t == 9:
            assert not torch.equal(layer.a.detach()[1:], start)  # they train
            moments = run.optimizer.state[layer.c]["exp_avg"]
            assert moments[0] != 0 and not bool(moments[1:].any())
    run.step(50)
    assert not bool(run.table.spare.any())
    assert sum(layer.rank for layer in run.layers.values()) == 15
    run.step(51)
    assert all(bool((layer.c.detach() != SPARE_GATE).all()) for layer in run.layers.values())  # all gates are free


def test_growth_wakes_the_oldest_spare_with_its_moments_and_leaves_the_function_alone(stack: Any) -> None:
    run = Run(*stack(n=2, rank=1, part=Components()), 12, allocator=Grow(interval=10, spares=1, per_module=2))
    for t in range(1, 20):
        run.step(t)
    rows = [r.clone() for r in run.table.rows]
    layer = run.layers["0"]
    scores = OfModules()
    scores.values = (1.0, 0.0)
    run.allocation.importance = scores
    (run.model(run.x) - 1).square().mean().backward()
    run.allocation.after_backward(20)
    run.optimizer.step()
    before, moments = run.model(run.x), run.optimizer.state[layer.a]["exp_avg"].clone()
    run.allocation.after_step(20, run.optimizer)
    # limit 2 + round(10 / 4) = 4: module 0 gains two, its spare and a new one; another spare is added
    assert run.table.alive[run.table.rows[0]].tolist() == [True, True, True, False]
    assert run.table.rows[0][:2].tolist() == rows[0].tolist()
    assert run.table.spare[run.table.rows[0]].tolist() == [False, False, False, True]
    assert layer.c.detach()[1] == pytest.approx(SPARE_GATE) and layer.c[2] == 0
    assert torch.allclose(run.model(run.x), before, atol=2e-3)  # the new spare's gate is 1e-5, its factors are large
    state = run.optimizer.state[layer.a]["exp_avg"]
    assert torch.equal(state[:2], moments) and not bool(state[2:].any())


def test_the_oldest_spares_wake_first(stack: Any) -> None:
    run = Run(*stack(n=1, rank=1, part=Svd()), 5, allocator=Grow(interval=10, spares=3, per_module=1))
    first, *spares = run.table.rows[0].tolist()
    for t in range(1, 21):
        run.step(t)
    assert torch.nonzero(run.table.alive).flatten().tolist() == [first, spares[0]]


@pytest.mark.parametrize("part", [Svd, Components, Lora, WeightDecomposed])
def test_growth_without_spares_keeps_the_function_to_1e_6(stack: Any, part: Any) -> None:
    run = Run(*stack(n=3, rank=1, part=part()), 18, allocator=Grow(interval=10, spares=0))
    for t in range(1, 51):
        (run.model(run.x) - 1).square().mean().backward()
        run.optimizer.step()
        before = run.model(run.x)
        event = run.allocation.after_step(t, run.optimizer)
        run.optimizer.zero_grad()
        if event:
            assert torch.allclose(run.model(run.x), before, atol=1e-6)
    assert run.allocation.alive_count() == 18


def test_where_there_are_no_gates_there_are_no_spares(stack: Any) -> None:
    run = Run(*stack(n=3, rank=1, part=Lora()), 18)
    assert [layer.rank for layer in run.layers.values()] == [1, 1, 1]
    for t in range(1, 51):
        run.step(t)
        assert not bool(run.table.spare.any())


def test_spares_never_exceed_full_rank() -> None:
    model, layers = uneven(Svd(), [3, 3, 3])
    run = Run(model, layers, 12, allocator=Grow(interval=10, spares=3))
    for t in range(1, 50):
        assert max(layer.rank for layer in layers.values()) == 4
        run.step(t)


def test_spares_asked_for_by_number_need_gates() -> None:
    def check(adapter: str, allocator: Grow) -> str:
        parts = load(ADAPTERS, adapter, key=""), load(IMPORTANCES, "random", key=""), Linear, allocator, NoRegularizer
        return rules.check(*parts, {"adapter": adapter, "importance": "random", "allocator": "grow", "regularizer": ""})

    assert check("lora", Grow()) == check("lora", Grow(spares=0)) == check("svd", Grow(spares=2)) == "components"
    with pytest.raises(UserError, match="adapter=lora allocator=grow") as error:
        check("lora", Grow(spares=1))
    assert "needs gates" in (error.value.where or "")
    assert error.value.hint.endswith(", or allocator.spares=0 instead of allocator.spares=1")
    assert " grow" not in error.value.hint
    assert load(ALLOCATORS, "grow", key="").needs == frozenset()


def test_other_parts_leave_spares_out(stack: Any) -> None:
    run = Run(*stack(n=2, rank=2, part=Components()), 8, allocator=Grow(spares=1), importance=Sensitivity())
    table = run.table
    probed: list[Tensor] = []
    scores = Ablation().scores(table, lambda mask: float(probed.append(mask.clone()) or 0.0))
    assert torch.equal(probed[0], table.alive)  # the model is the one without spares
    assert len(probed) == 1 + 2 * 4
    assert bool((scores[table.spare] == -torch.inf).all())
    state = run.allocation.unit_state()
    assert state["alive"].tolist() == [True] * 4 + [False] * 2
    assert table.dead_share() == 0.0
    table.drop(torch.tensor([True] + [False] * 5))
    assert table.spare.sum() == 2  # dropping some leaves the others, spares included, as they are
    assert table.alive.tolist() == [False, True, True, True, False, False]
    table.keep(table.alive, final=True)
    assert not bool(table.spare.any())


def test_saved_state_goes_on_bit_for_bit(stack: Any) -> None:
    def begun() -> Run:
        return Run(
            *stack(n=3, rank=1, part=Svd()),
            15,
            importance=ModuleSensitivity(),
            allocator=Grow(interval=5, spares=2),
            regularizer=Orthogonal(),
        )

    whole = begun()
    for t in range(1, 28):
        whole.step(t)
    state = whole.allocation.state_dict()
    saved = {(n, k): p for n, la in whole.layers.items() for k, p in la.adapter_parameters().items()}
    resumed = begun()
    resumed.allocation.load_state_dict({part: dict(values) for part, values in state.items()})
    for (name, key), parameter in saved.items():
        resumed.layers[name].adapter_parameters()[key].data.copy_(parameter)
    resumed.optimizer = torch.optim.AdamW(parameter_groups(resumed.layers, lr=1e-2, weight_decay=0.1), fused=True)
    for (name, key), parameter in saved.items():
        own = resumed.layers[name].adapter_parameters()[key]
        resumed.optimizer.state[own] = {k: v.clone() for k, v in whole.optimizer.state[parameter].items()}
    for t in range(28, 61):
        torch.manual_seed(t)
        event = whole.step(t)
        torch.manual_seed(t)
        assert event == resumed.step(t)
    for name, layer in whole.layers.items():
        for key, parameter in layer.adapter_parameters().items():
            assert torch.equal(parameter, resumed.layers[name].adapter_parameters()[key])
