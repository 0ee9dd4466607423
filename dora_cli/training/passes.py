"""Forward passes that are made for what they show: before training, and while it allocates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dora_cli.data.batching import dealt, has_share, sequential_batches
from dora_cli.data.encoded import Encoded
from dora_cli.data.packing import pack
from dora_cli.data.tasks.base import Task
from dora_cli.errors import UserError
from dora_cli.modes import autocast, evaluating, rehearsing
from dora_cli.processes import World

ROUNDING = {None: 1e-4, torch.bfloat16: 5e-3}  # how far apart two ways to the same loss may come, as a share of it


def keeping_apart(
    model: nn.Module, task: Task, encoded: Encoded, length: int, device: torch.device, dtype: torch.dtype | None
) -> Encoded:
    """Several documents to a row, where this model keeps them apart: a row of two has to have the loss of both alone.

    Raises:
        UserError: the model lets them see each other.
    """
    packed = pack(encoded, length)
    middle = max(len(encoded) // 2 - 1, 0)
    two = encoded.select(encoded.lengths.argsort(stable=True)[middle : middle + 2].tolist())  # of middling length
    if len(two) == 2:
        alone, together = two.batch([0, 1]), pack(two, int(two.lengths.sum())).batch([0])
        with evaluating(model), torch.no_grad(), autocast(device, dtype):
            apart, packed_loss = (
                float(task.loss(model, {k: v.to(device) for k, v in batch.items()}).total)
                for batch in (alone, together)
            )
        if abs(apart - packed_loss) > ROUNDING[dtype] * max(1.0, abs(apart)):
            raise UserError(
                f"data.packing=true: {type(model).__name__} lets the documents of a row see each other",
                where=f"two documents have a loss of {apart:.6g} apart and {packed_loss:.6g} in one row",
                hint="set data.packing=false",
            )
    return packed


def first_row(
    model: nn.Module, task: Task, encoded: Encoded, device: torch.device, dtype: torch.dtype | None
) -> Callable[[], object]:
    """A forward pass on one row as in training, which leaves no trace."""
    batch = {k: v.to(device) for k, v in encoded.batch([0]).items()}

    def run() -> None:
        with rehearsing(model), torch.no_grad(), autocast(device, dtype):
            task.loss(model, batch)

    return run


def probes(
    model: nn.Module,
    task: Task,
    rows: Encoded,
    parts: Mapping[str, Any],
    seed: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype | None,
    world: World,
) -> dict[str, Callable[[], float] | None]:
    """The losses of held-out rows that the parts ask for: ``probe`` the importance, ``held_out`` the schedule."""
    importance, schedule = parts["importance"], parts["schedule"]
    plans: dict[str, list[list[int]]] = {"probe": [], "held_out": []}
    if "probe" in importance.needs:
        plans["probe"] = [list(range(min(importance.rows, len(rows))))]
    if schedule.finds_budget:
        generator = torch.Generator().manual_seed(seed)  # sets may be sorted by label
        chosen = torch.randperm(len(rows), generator=generator)[: schedule.rows]
        batches = sequential_batches(rows.lengths[chosen], batch_size)
        plans["held_out"] = [chosen[batch].tolist() for batch in batches]
    return {name: fixed_loss(model, task, rows, plan, device, dtype, world) for name, plan in plans.items()}


def fixed_loss(
    model: nn.Module,
    task: Task,
    rows: Encoded,
    plan: Sequence[list[int]],
    device: torch.device,
    dtype: torch.dtype | None,
    world: World,
) -> Callable[[], float] | None:
    """The loss on the same batches of held-out rows each time, in eval mode, leaving no trace; None without any."""
    if not plan:
        return None
    mine = [{k: v.to(device) for k, v in rows.batch(own).items()} for own in dealt(plan, world)]
    counts = [has_share(whole, world) for whole in plan]

    def loss() -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(model), torch.no_grad(), autocast(device, dtype):
            for batch, is_mine in zip(mine, counts, strict=True):
                total, count, _ = task.loss(model, batch)
                sums += torch.tensor([float(total), float(count)], dtype=torch.float64) * is_mine
        world.add_up(sums)
        return float(sums[0] / sums[1])

    return loss
