"""DLoRA: how far modules move, which of them train and when, and what that does to parameters and optimizer."""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from dora_cli.adapters.aflora import Aflora
from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import parameter_groups
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.svd import Svd
from dora_cli.allocation.allocators.kill_and_revive import ACTIVE, IDLE, PROBATION, KillAndRevive
from dora_cli.allocation.allocators.none import NoAllocator
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.displacement import Displacement, distance, product_norm
from dora_cli.allocation.importance.none import NoImportance
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import Constant, CubicEarly
from dora_cli.allocation.table import UnitTable
from dora_cli.errors import UserError

TOTAL = 60


class Given(Random):
    """Scores that a test sets."""

    values: torch.Tensor

    def scores(self, table: Any, probe: Any) -> torch.Tensor:
        return self.values


def joined(layers: Any, importance: Any = None, **options: Any) -> Allocation:
    return Allocation(
        layers,
        schedule=CubicEarly(start=10, end=50),
        importance=importance or Displacement(),
        allocator=KillAndRevive(**({"interval": 5} | options)),
        regularizer=NoRegularizer(),
        total_steps=TOTAL,
        units="modules",
    )


def optimizer_of(layers: Any, lr: float = 1e-2, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(layers, lr=lr, weight_decay=weight_decay), fused=True)


def trained(
    model: nn.Module, allocation: Allocation, optimizer: Any, *, first: int = 1, last: int = TOTAL
) -> Iterator[tuple[int, Any]]:
    """Train; yields (step, event or None) after each step."""
    g = torch.Generator().manual_seed(7)
    x, y = torch.randn(64, 16, generator=g), torch.randn(64, 16, generator=g)
    for step in range(first, last + 1):
        (model(x) - y).square().mean().backward()
        allocation.after_backward(step)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.1)
        optimizer.step()
        event = allocation.after_step(step, optimizer)
        optimizer.zero_grad(set_to_none=True)
        yield step, event


def copied(layers: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {n: {k: p.detach().clone() for k, p in la.adapter_parameters().items()} for n, la in layers.items()}


def in_optimizer(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


# ---- displacement ------------------------------------------------------------------------------------------------
def test_norms_of_products_and_their_difference_are_those_of_the_dense_matrices() -> None:
    g = torch.Generator().manual_seed(0)
    a, a0, b, b0 = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 9), (3, 9), (7, 3), (7, 3)))
    assert float(product_norm(a, b)) == pytest.approx(float((b @ a).norm()), rel=1e-12)
    assert float(distance((a, b), (a0, b0))) == pytest.approx(float((b @ a - b0 @ a0).norm()), rel=1e-12)


def test_a_move_of_a_millionth_is_still_measured_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=g), torch.randn(64, 4, generator=g)
    moved = (a + 1e-6 * torch.randn(4, 64, generator=g), b + 1e-6 * torch.randn(64, 4, generator=g))
    exact = (moved[1].double() @ moved[0].double() - b.double() @ a.double()).norm()
    # the sums of a and its move are rounded to 6e-8 of a, 6 % of the move, at random
    assert float(distance(moved, (a, b))) == pytest.approx(float(exact), rel=1e-2)


@pytest.mark.parametrize(
    "part", [Lora(alpha=3.0), Components(), Svd(alpha=5.0), Aflora()], ids=lambda p: type(p).__name__
)
def test_scores_are_the_smoothed_relative_moves_of_the_dense_updates(stack: Any, part: Any) -> None:
    _, layers = stack(n=3, width=8, rank=2, part=part)
    table, importance = UnitTable(layers, "modules"), Displacement(beta=0.25)
    importance.attach(table)
    expected = torch.zeros(3)
    for period in range(3):
        before = [layer.delta_weight() for layer in layers.values()]
        with torch.no_grad():
            for layer in layers.values():
                for p in layer.adapter_parameters().values():
                    p.add_(torch.randn_like(p) * 0.1)
        importance.close_period(table)
        after = [layer.delta_weight() for layer in layers.values()]
        now = torch.stack([(b - a).norm() / a.norm() for a, b in zip(before, after, strict=True)])
        expected = now if period == 0 else 0.25 * expected + 0.75 * now
        assert torch.allclose(importance.scores(table, None), expected, rtol=1e-4)
        assert torch.equal(importance.scores(table, None), importance.scores(table, None)), "asking changes the answer"


def test_where_the_update_was_zero_the_move_is_measured_by_the_base_weight(stack: Any) -> None:
    _, layers = stack(n=2, width=8, rank=2, part=Lora(), shake=False)
    table, importance = UnitTable(layers, "modules"), Displacement()
    importance.attach(table)
    with torch.no_grad():
        layers["0"].b.normal_()
    importance.close_period(table)
    layer = layers["0"]
    expected = float(layer.delta_weight().norm() / layer.base_layer.weight.norm())
    assert importance.scores(table, None).tolist() == pytest.approx([expected, 0.0], rel=1e-5)


def test_parameters_can_be_measured_in_place_of_the_update(stack: Any) -> None:
    _, layers = stack(n=2, width=8, rank=2, part=Components())
    table, importance = UnitTable(layers, "modules"), Displacement(measure="parameters")
    importance.attach(table)
    before = copied(layers)["0"]
    with torch.no_grad():
        for p in layers["0"].adapter_parameters().values():
            p.add_(torch.randn_like(p) * 0.1)
    importance.close_period(table)
    after = copied(layers)["0"]
    moved = sum(float((after[k] - before[k]).square().sum()) for k in before) ** 0.5
    size = sum(float(v.square().sum()) for v in before.values()) ** 0.5
    assert importance.scores(table, None).tolist() == pytest.approx([moved / size, 0.0], rel=1e-5)


def test_a_module_that_returns_is_judged_by_what_it_does_now(stack: Any) -> None:
    _, layers = stack(n=2, width=8, rank=2, part=Lora())
    table, importance = UnitTable(layers, "modules"), Displacement(beta=0.9)
    importance.attach(table)

    def move(size: float) -> None:
        with torch.no_grad():
            for layer in layers.values():
                if layer.b.requires_grad:
                    layer.b.mul_(1 + size)
        importance.close_period(table)

    move(0.5)
    table.freeze(torch.tensor([True, False]))
    move(0.1)
    assert importance.scores(table, None).tolist() == pytest.approx([0.5, 0.9 * 0.5 + 0.1 * 0.1], rel=1e-4)
    table.thaw(torch.tensor([True, False]))
    move(0.01)
    assert float(importance.scores(table, None)[0]) == pytest.approx(0.01, rel=1e-3)


# ---- who trains --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{}, {"killed": "drop"}, {"state": "keep"}, {"choice": "probe"}], ids=lambda o: "-".join(o.values())
)
def test_as_many_modules_train_as_the_schedule_says_and_idle_ones_stay_bit_for_bit(stack: Any, options: Any) -> None:
    model, layers = stack(n=12, width=16, rank=2, part=Lora())
    allocation = joined(layers, probation=2, **options)
    optimizer = optimizer_of(layers)
    seen = set()
    before = copied(layers)
    idle_before: list[bool] = [False] * 12
    for step, event in trained(model, allocation, optimizer):
        if event is None:
            continue
        after = copied(layers)
        for name, idle in zip(layers, idle_before, strict=True):
            same = all(torch.equal(after[name][k], before[name][k]) for k in after[name])
            assert same == idle, f"{name} at step {step}"
        states = allocation.allocator.states
        x = min(max((step - 10) / 40, 0.0), 1.0)
        count = 2 + round(10 * (1 - x) ** 3)
        assert int((states != IDLE).sum()) == count == event["alive"] == event["budget"]
        assert event["idle"] == [n for n, s in zip(layers, states.tolist(), strict=True) if s == IDLE]
        for (_, layer), state in zip(layers.items(), states.tolist(), strict=True):
            for p in layer.adapter_parameters().values():
                assert p.requires_grad == (state != IDLE) == (id(p) in in_optimizer(optimizer))
            assert layer.active == (state != IDLE or options.get("killed") != "drop")
        if int((states == PROBATION).sum()):
            assert int((states == PROBATION).sum()) == min(2, count - 1)
            seen.add(step)
        before, idle_before = after, (states == IDLE).tolist()
    assert seen == {20, 30, 40}  # every second period once there are idle modules, and not at the end
    assert int((allocation.allocator.states == ACTIVE).sum()) == 2


def test_with_all_modules_active_it_is_plain_lora_bit_for_bit(stack: Any) -> None:
    results = []
    for kind in ("lora", "dlora"):
        model, layers = stack(n=6, width=16, rank=2, part=Lora(dropout=0.1))
        if kind == "dlora":
            allocation = joined(layers, active=1.0)
        else:
            parts: dict[str, Any] = {"importance": NoImportance(), "allocator": NoAllocator()}
            allocation = Allocation(
                layers, schedule=Constant(), regularizer=NoRegularizer(), total_steps=TOTAL, **parts
            )
        torch.manual_seed(3)
        for _ in trained(model, allocation, optimizer_of(layers)):
            pass
        results.append(copied(layers))
    for name, parameters in results[0].items():
        for key, value in parameters.items():
            assert torch.equal(value, results[1][name][key]), f"{name}.{key}"


def test_the_lowest_go_and_all_that_train_are_ranked_together(stack: Any) -> None:
    _, layers = stack(n=8, rank=2, part=Lora())
    given = Given()
    allocation = joined(layers, given, active=0.5, probation=1)
    optimizer = optimizer_of(layers)
    given.values = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    for step in range(1, 16):
        allocation.after_step(step, optimizer)
    states = allocation.allocator.states
    n = 4 + round(4 * (1 - 5 / 40) ** 3)
    assert states.tolist() == [ACTIVE] * n + [IDLE] * (8 - n)
    for step in range(16, 21):
        allocation.after_step(step, optimizer)
    n = 4 + round(4 * (1 - 10 / 40) ** 3)
    assert states.tolist() != allocation.allocator.states.tolist()
    first_idle = 7  # only module 7 was idle before this event, so it is its turn
    assert allocation.allocator.states[first_idle] == PROBATION
    assert allocation.allocator.states.tolist()[: n - 1] == [ACTIVE] * (n - 1)
    given.values = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 9])  # the one on probation shows its worth
    for step in range(21, 26):
        allocation.after_step(step, optimizer)
    assert allocation.allocator.states[7] == ACTIVE


def test_idle_modules_take_turns(stack: Any) -> None:
    _, layers = stack(n=8, rank=2, part=Lora())
    given = Given()
    allocation = Allocation(
        layers,
        schedule=CubicEarly(start=0, end=400),
        importance=given,
        allocator=KillAndRevive(interval=1, active=0.25, revive_every=1, probation=1),
        regularizer=NoRegularizer(),
        total_steps=400,
        units="modules",
    )
    given.values = torch.arange(8.0).flip(0)
    revived = []
    for step in range(1, 400):
        event = allocation.after_step(step, optimizer_of(layers))
        assert event is not None
        revived += event["probation"]
    late = [int(name) // 2 for name in revived[-12:]]
    assert len(set(late)) == 7  # the worst of the two stays out at once, the best never leaves
    assert all((b - a) % 8 in (1, 2) for a, b in pairwise(late))


def test_the_floor_holds_and_the_last_active_module_is_never_on_probation(stack: Any) -> None:
    model, layers = stack(n=6, width=16, rank=2, part=Lora())
    allocation = joined(layers, active=0.01, least=1, probation=6, revive_every=1)
    for _, event in trained(model, allocation, optimizer_of(layers)):
        if event:
            assert int((allocation.allocator.states == ACTIVE).sum()) >= 1
    assert allocation.last == 1
    assert joined(stack(n=3)[1], least=9).last == 3


# ---- optimizer ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", ["drop", "keep"])
def test_a_revived_module_is_back_in_its_groups_with_their_rate_and_its_moments_as_asked(
    stack: Any, state: str
) -> None:
    model, layers = stack(n=8, width=16, rank=2, part=Components())
    allocation = joined(layers, state=state, active=0.25, probation=1)
    optimizer = optimizer_of(layers)
    at_start = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    steps_before: dict[str, float] = {}
    revived = 0
    for step, event in trained(model, allocation, optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert at_start[id(p)] == (group["lr"], group["weight_decay"])
        if event is None:
            continue
        for name in event["idle"]:
            kept = [p for p in layers[name].adapter_parameters().values() if optimizer.state.get(p)]
            assert len(kept) == (3 if state == "keep" else 0)
            if kept:
                steps_before[name] = float(optimizer.state[kept[0]]["step"])
        for name in event["probation"]:
            moments = optimizer.state.get(layers[name].a, {})
            assert (float(moments["step"]) if moments else 0.0) == steps_before.get(name, 0.0) < step
            revived += 1
    assert revived == 3


def test_projections_that_never_trained_are_not_thawed(stack: Any) -> None:
    _, layers = stack(n=2, width=8, rank=2, part=Aflora(freeze_square=True))
    table = UnitTable(layers, "modules")
    assert not bool(table.frozen.any())
    everything = torch.ones(2, dtype=torch.bool)
    table.freeze(everything)
    assert not any(p.requires_grad for layer in layers.values() for p in layer.adapter_parameters().values())
    table.thaw(everything)
    for layer in layers.values():
        assert {n for n, p in layer.adapter_parameters().items() if p.requires_grad} == {"s_d", "s_b"}


# ---- probe -------------------------------------------------------------------------------------------------------
def test_a_probe_revives_the_idle_module_with_the_largest_gradient_and_leaves_no_trace(stack: Any) -> None:
    results = []
    for choice in ("round_robin", "probe"):
        model, layers = stack(n=8, width=16, rank=2, part=Lora())
        allocation = joined(layers, choice=choice, probation=1)
        optimizer = optimizer_of(layers)
        kept: dict[str, torch.Tensor] = {}
        real = allocation.allocator._probe

        def spy(on: bool, real: Any = real, layers: Any = layers, kept: Any = kept) -> None:
            if not on:
                for name, layer in layers.items():
                    if layer.b.grad is not None:
                        kept[name] = (layer.b.grad.norm() * layer.a.detach().norm()).clone()
            real(on)

        allocation.allocator._probe = spy  # type: ignore[method-assign]
        for step, event in trained(model, allocation, optimizer, last=20):
            if step == 15:
                idle = list(event["idle"])
                assert idle
        if choice == "probe":
            assert event["probation"] == [max(idle, key=lambda name: float(kept[name]))]
        results.append((copied(layers), allocation.allocator.states.clone()))
    # up to and with step 20 both have taken the same steps, clipped by the same norm
    for name, parameters in results[0][0].items():
        for key, value in parameters.items():
            assert torch.equal(value, results[1][0][name][key])


def test_a_probe_needs_modules_that_contribute() -> None:
    with pytest.raises(UserError, match=r"allocator\.choice=probe"):
        KillAndRevive(choice="probe", killed="drop")


def test_what_would_be_sent_is_counted_module_by_module(stack: Any) -> None:
    """With hooks on the layers that are on: d_in in and d_out out a token, and as much for the gradients."""
    model, layers = stack(n=8, width=16, rank=2, part=Lora())
    allocation = joined(layers, killed="drop")
    *_, (_, event) = ((s, e) for s, e in trained(model, allocation, optimizer_of(layers)) if e)
    sent = 0

    def meter(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal sent
        if layer.active:
            sent += 2 * (inputs[0].numel() + output.numel())

    for layer in layers.values():
        layer.register_forward_hook(meter)
    model(torch.randn(7, 16))
    assert sent == 7 * event["per_token"]["values"] == 7 * 2 * 32 * len([la for la in layers.values() if la.active])
    assert event["alive"] == 1


@pytest.mark.parametrize("at", [17, 19, 20, 23])
@pytest.mark.parametrize("options", [{}, {"killed": "drop"}, {"state": "keep", "choice": "probe"}], ids=str)
def test_a_restored_allocation_goes_on_alike(stack: Any, at: int, options: Any) -> None:
    def run(last: int) -> tuple[Any, ...]:
        model, layers = stack(n=8, width=16, rank=2, part=Lora())
        allocation, optimizer = joined(layers, **options), optimizer_of(layers)
        return model, layers, allocation, optimizer, list(trained(model, allocation, optimizer, last=last))

    _, _, whole, _, events = run(TOTAL)
    _, layers, allocation, optimizer, _ = run(at)
    model2, layers2 = stack(n=8, width=16, rank=2, part=Lora())
    second = joined(layers2, **options)
    second.load_state_dict(copy.deepcopy(allocation.state_dict()))
    with torch.no_grad():
        for name, layer in layers2.items():
            for key, p in layer.adapter_parameters().items():
                p.copy_(layers[name].adapter_parameters()[key])
    optimizer2 = optimizer_of(layers2)
    for name, layer in layers2.items():
        for key, p in layer.adapter_parameters().items():
            old = layers[name].adapter_parameters()[key]
            if optimizer.state.get(old):
                optimizer2.state[p] = {k: v.clone() for k, v in optimizer.state[old].items()}
    for step, event in trained(model2, second, optimizer2, first=at + 1):
        assert event == events[step - 1][1], f"step {step}"
    assert torch.equal(second.allocator.states, whole.allocator.states)
