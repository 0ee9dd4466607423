"""Runs a model over a split: loss, metrics, and on request what it said to every row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dora_cli.data.batching import batches, sequential_batches
from dora_cli.data.encoded import Encoded
from dora_cli.data.tasks.base import Task
from dora_cli.evaluation.scorers import build_scorer, join
from dora_cli.modes import autocast, evaluating
from dora_cli.processes import ALONE, World


@dataclass
class EvalResult:
    """``metrics``: ``loss`` (the mean over rows, or tokens) and the task's metrics by name. ``predictions``: an object
    with ``id`` and what the scorer has to say (``prediction`` and ``reference``) a row, in the order of the rows, or
    ``None`` if they were not asked for."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]] | None = None


def evaluate(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    *,
    device: torch.device | str,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    keep_predictions: bool = False,
    advance: Callable[[int], object] = lambda rows: None,
    world: World = ALONE,
    in_step: bool = False,
) -> EvalResult:
    """Measure a model on a split, without gradients, dropout or random numbers; its training mode is restored.

    Args:
        model: on ``device``.
        task: fitted; gives loss, predictions and the names of the metrics.
        encoded: the split.
        device: where the batches go.
        batch_size: rows per batch; the results do not depend on it, but for rounding.
        autocast_dtype: ``torch.bfloat16`` for mixed precision; ``None`` for the weights' own.
        keep_predictions: also return what the model said to every row (a few values a row are kept, never the logits).
        advance: called after every batch with the number of its rows.
        world: of several processes each runs over its share of the batches; all get the same metrics, no predictions.
        in_step: whether all of them must run the model equally often, as a sharded base needs.
    """
    scorer = build_scorer(task, keep=keep_predictions)
    device = torch.device(device)
    plan = sequential_batches(encoded.lengths, batch_size)
    # What is written takes as many passes as it has tokens: then each process writes all of it, the main one counts.
    together = in_step and scorer.writes
    mine = plan if together else list(world.share(plan))
    idle = -(-len(plan) // world.size) - len(mine) if in_step and not together else 0
    losses: list[Tensor] = []  # one number a batch, read at the end: no waiting for the device in between
    count: int | Tensor = 0
    compares = len(encoded.references) > 0
    with evaluating(model), torch.no_grad(), autocast(device, autocast_dtype):
        for rows, batch in zip(mine, batches(encoded, mine, pin=device.type == "cuda"), strict=True):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            total, n, outputs = task.loss(model, batch)
            scorer.update(model, outputs, batch, [encoded.references[i] for i in rows] if compares else ())
            losses.append(total)
            count = count + n
            advance(len(rows))
        for batch in batches(encoded, plan[-1:] * idle):
            task.loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
    loss = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    sums = torch.tensor([loss, int(count)], dtype=torch.float64)
    values: dict[str, float] = {}
    if not together:
        world.add_up(sums)
        join(scorer, world)
    if world.is_main:
        values = {"loss": sums[0].item() / max(int(sums[1]), 1), **scorer.metrics()}
    values = world.from_main({}, values)[1]
    if not keep_predictions:
        return EvalResult(values)
    said = scorer.predictions()
    if encoded.windows_of is not None:
        return EvalResult(values, said)
    order = torch.tensor([row for batch in plan for row in batch]).argsort()  # back from long-to-short
    return EvalResult(values, [{"id": i, **said[k]} for i, k in zip(encoded.ids, order.tolist(), strict=True)])
