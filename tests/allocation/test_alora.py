"""ALoRA: who loses, who shares what was freed, that the total holds, and that scoring and growing leave no trace."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_cli.adapters.inject import inject, parameter_groups
from dora_cli.adapters.lora import Lora
from dora_cli.adapters.mora_components import MoraComponents
from dora_cli.allocation.allocators.prune_and_reallocate import PruneAndReallocate
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.growth import component_cost, hand_out
from dora_cli.allocation.importance.ablation import Ablation
from dora_cli.allocation.importance.gradient import Gradient
from dora_cli.allocation.importance.random import Random
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import Constant
from dora_cli.allocation.table import UnitTable


class Fixed(Random):
    """Scores that a test sets; units born later are worth nothing."""

    values: Tensor

    def scores(self, table: UnitTable, probe: Any) -> Tensor:
        return torch.cat([self.values, torch.zeros(len(table) - len(self.values))])


class Run:
    """A tiny regression under ALoRA, with a probe on a batch of its own."""

    def __init__(self, model: nn.Module, layers: Any, importance: Any = None, by_cost: bool = False, **options: Any):
        self.model, self.layers = model, layers
        g = torch.Generator().manual_seed(5)
        width = next(iter(layers.values())).d_in
        self.x, self.held_out = torch.randn(24, width, generator=g), torch.randn(8, width, generator=g)
        self.allocation = Allocation(
            layers,
            schedule=Constant(start=5, end=60),
            importance=importance or Ablation(),
            allocator=PruneAndReallocate(**{"interval": 5, **options}),
            regularizer=NoRegularizer(),
            total_steps=60,
            target=Target(1, by_cost=by_cost),
            probe=self.probe,
        )
        self.table = self.allocation.table
        self.optimizer = torch.optim.AdamW(parameter_groups(layers, lr=1e-2, weight_decay=0.01), fused=True)

    def probe(self) -> float:
        with torch.no_grad():
            return float((self.model(self.held_out) - 1).square().mean())

    def step(self, t: int) -> dict[str, Any] | None:
        (self.model(self.x) - 1).square().mean().backward()
        self.allocation.after_backward(t)
        self.optimizer.step()
        event = self.allocation.after_step(t, self.optimizer)
        self.optimizer.zero_grad()
        return event


# ---- who loses, and who shares ---------------------------------------------------------------------------------------
def test_the_published_example_shares_8_ranks_over_3_modules_as_3_3_2(stack: Any) -> None:
    _, layers = stack(n=5, rank=8, part=Lora())
    assert hand_out(UnitTable(layers), [4, 0, 2], 8, by_cost=False) == {4: 3, 0: 3, 2: 2}


def test_the_lowest_ranks_close_and_the_others_share_the_remainder_to_the_highest_mean(stack: Any) -> None:
    model, layers = stack(n=5, rank=8, part=Lora())
    fixed = Fixed()
    fixed.values = torch.cat([torch.full((8,), float(mean)) for mean in (20, 10, 40, 11, 30)])
    run = Run(model, layers, fixed, n=8)
    fixed.values[8:12] = fixed.values[24:28] = 0.0  # four each of modules 1 and 3 are the eight worst
    event = run.allocation.after_step(5, run.optimizer)
    assert event is not None
    assert event["ranks"] == {"0": 10, "2": 4, "4": 11, "6": 4, "8": 11}  # means 20, 40, 30: 2, 3, 3
    assert event["alive"] == 40
    assert event["scores"] == {"0": 20.0, "2": 5.0, "4": 40.0, "6": 5.5, "8": 30.0}


def test_when_every_module_lost_a_rank_nothing_is_added(stack: Any) -> None:
    fixed = Fixed()
    fixed.values = torch.arange(4).repeat(3).float()
    run = Run(*stack(n=3, rank=4, part=Lora()), fixed, n=3)
    event = run.allocation.after_step(5, run.optimizer)
    assert event is not None
    assert event["ranks"] == {"0": 3, "2": 3, "4": 3}
    assert event["alive"] == 9


def test_without_a_number_an_eighth_moves_which_is_one_rank_a_module_at_the_published_rank_8(stack: Any) -> None:
    fixed = Fixed()
    fixed.values = torch.arange(24).float()
    run = Run(*stack(n=3, rank=8, part=Lora()), fixed)
    event = run.allocation.after_step(5, run.optimizer)
    assert event is not None
    assert event["ranks"] == {"0": 5, "2": 9, "4": 10}  # three of module 0; two to module 2, the best


@pytest.mark.parametrize("importance", [Ablation, Random, Gradient])
def test_the_total_never_exceeds_the_start_and_equals_it_while_some_module_lost_nothing(
    stack: Any, importance: Any
) -> None:
    run = Run(*stack(n=4, rank=4, part=Lora()), importance(), n=3)
    total, before, events = 16, run.table.ranks(), 0
    for t in range(1, 61):
        rows, alive = len(run.table), run.table.alive.clone()
        event = run.step(t)
        if event:
            events += 1
            lost = set(run.table.module[:rows][alive & ~run.table.alive[:rows]].tolist())
            if len(lost) == 4:
                total -= 3
            assert event["alive"] == total == sum(event["ranks"].values())
            before = event["ranks"]
    assert events == 8  # the paper's number of rounds, then nothing moves
    assert run.table.ranks() == before


def test_eight_rounds_happen_wherever_the_schedule_starts(stack: Any) -> None:
    for start in (0, 1, 5):
        _, layers = stack(n=2, rank=4, part=Lora())
        allocation = Allocation(
            layers,
            schedule=Constant(start=start, end=60),
            importance=Random(),
            allocator=PruneAndReallocate(interval=5),
            regularizer=NoRegularizer(),
            total_steps=60,
        )
        assert sum(allocation.is_event(t) for t in range(1, 61)) == 8


def test_under_a_budget_of_parameters_new_ranks_cost_no_more_than_was_closed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)).requires_grad_(False)
    layers = inject(model, ["0", "1", "2"], Lora(), [4, 4, 4])
    run = Run(model, layers, Random(), by_cost=True, n=2)
    start = run.table.alive_cost()
    for t in range(1, 61):
        event = run.step(t)
        assert not event or event["params"] <= start


def test_a_module_of_rank_0_is_costed_by_its_own_factors(stack: Any) -> None:
    _, layers = stack(n=2, rank=0, part=MoraComponents(square_rank=1))
    layer = layers["0"]
    assert layer.unit_costs() == []
    assert component_cost(layer) == 2 * layer.side < layer.d_in + layer.d_out


# ---- ranks that are new ----------------------------------------------------------------------------------------------
def test_adding_ranks_leaves_logits_unchanged_to_1e_6_and_gives_them_no_moments(stack: Any) -> None:
    fixed = Fixed()
    run = Run(*stack(n=4, rank=4, part=Lora()), fixed, n=4)
    fixed.values = torch.arange(16).float()
    for t in range(1, 5):
        run.step(t)
    (run.model(run.x) - 1).square().mean().backward()
    run.optimizer.step()
    closing = torch.zeros(16, dtype=torch.bool)
    closing[:4] = True
    with run.table.only(~closing):
        pruned = run.model(run.x)
    assert (run.model(run.x) - pruned).abs().max() > 1e-2  # closing changes it, adding does not
    run.allocation.after_step(5, run.optimizer)
    assert run.allocation.alive_count() == 16
    assert torch.allclose(run.model(run.x), pruned, atol=1e-6)
    grown = run.layers["6"]
    assert grown.rank == 6
    for name, axis in (("a", 0), ("b", 1)):
        moments = run.optimizer.state[getattr(grown, name)]["exp_avg"]
        assert bool(moments.narrow(axis, 0, 4).any()) and not bool(moments.narrow(axis, 4, 2).any())


@pytest.mark.parametrize("part", [Lora, MoraComponents])
def test_ranks_added_to_an_empty_module_train(stack: Any, part: Any) -> None:
    """A module with nothing in it is not in the optimizer; with its first rank it must be."""
    model, layers = stack(n=2, rank=3, part=part())
    fixed = Fixed()
    fixed.values = torch.tensor([0.0, 1, 2, 9, 9, 9])
    run = Run(model, layers, fixed, n=3)
    for t in range(1, 6):
        run.step(t)
    assert run.table.ranks() == {"0": 0, "2": 6}
    assert layers["0"].rank == 0
    fixed.values = torch.tensor([0.0, 0, 0, 9, 9, 9])  # newcomers are worth nothing: they go, and module 0 gains
    for t in range(6, 11):
        run.step(t)
    assert run.table.ranks() == {"0": 3, "2": 3}
    start = layers["0"].b.detach().clone()
    for t in range(11, 14):
        run.step(t)
    in_optimizer = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in in_optimizer for p in layers["0"].adapter_parameters().values())
    assert layers["0"].adapter_parameters()[layers["0"].valve].abs().max() > 0
    assert part is not Lora or not torch.equal(layers["0"].b, start)


# ---- scores ----------------------------------------------------------------------------------------------------------
def test_scoring_changes_no_parameter_random_or_optimizer_state(stack: Any) -> None:
    run = Run(*stack(n=3, rank=3, part=Lora(dropout=0.3)))
    for t in range(1, 4):
        run.step(t)
    (run.model(run.x) - 1).square().mean().backward()
    parameters = [p for layer in run.layers.values() for p in layer.adapter_parameters().values()]
    before = [p.detach().clone() for p in parameters]
    gradients = [p.grad.clone() for p in parameters]
    moments = [{k: v.clone() for k, v in run.optimizer.state[p].items()} for p in parameters]
    run.model.eval()  # as the loop's probe does
    rng = torch.get_rng_state()
    assert bool(torch.isfinite(run.allocation._scores()).all())
    assert torch.equal(rng, torch.get_rng_state())
    for p, value, gradient, state in zip(parameters, before, gradients, moments, strict=True):
        assert torch.equal(p, value) and p.grad is not None and torch.equal(p.grad, gradient)
        assert all(torch.equal(run.optimizer.state[p][k], v) for k, v in state.items())
    assert all(layer.probe_mask is None for layer in run.layers.values())


def test_closing_all_gates_reproduces_the_base_model(stack: Any) -> None:
    run = Run(*stack(n=3, rank=3, part=Lora()))
    with run.table.only(torch.zeros(9, dtype=torch.bool)):
        closed = run.model(run.x)
    base = run.x
    for module in run.model.children():
        base = getattr(module, "base_layer", module)(base)
    assert torch.equal(closed, base)


def test_a_rank_whose_b_is_zero_loses_nothing_when_it_goes(stack: Any) -> None:
    run = Run(*stack(n=2, rank=3, part=Lora()))
    with torch.no_grad():
        run.layers["0"].b[:, 2] = 0.0
    run.allocation.importance.only_term = False  # type: ignore[attr-defined]
    assert float(run.allocation._scores()[2]) == 0.0


def test_only_living_ranks_are_scored(stack: Any) -> None:
    run = Run(*stack(n=3, rank=4, part=Lora()), n=2)
    for t in range(1, 6):
        run.step(t)
    scores = run.allocation._scores()
    assert torch.equal(torch.isfinite(scores), run.table.alive)
    assert len(scores) == 14 and int(run.table.alive.sum()) == 12
