"""Forward passes that are made for what they show: before training, and while it allocates."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dora_cli.data.batching import dealt, has_share
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


def probe(
    model: nn.Module,
    task: Task,
    encoded: Mapping[str, Encoded],
    importance: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    world: World,
) -> Any:
    """The loss on a fixed batch of validation rows, in eval mode, leaving no trace; None where nobody asks for it."""
    if "probe" not in importance.needs:
        return None
    rows = encoded["validation"]
    whole = list(range(min(importance.rows, len(rows))))
    batch = rows.batch(next(dealt([whole], world)))
    batch = {k: v.to(device) for k, v in batch.items()}

    def loss() -> float:
        with evaluating(model), torch.no_grad(), autocast(device, dtype):
            total, count, _ = task.loss(model, batch)
        sums = torch.tensor([float(total), float(count)], dtype=torch.float64) * has_share(whole, world)
        world.add_up(sums)
        return float(sums[0] / sums[1])

    return loss
