"""Runs a model over a split: loss, metrics, and on request what it said to every row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dora_cli.data.batching import batches, sequential_batches
from dora_cli.data.encoded import Encoded
from dora_cli.data.tasks.base import Task
from dora_cli.evaluation.scorers import build_scorer
from dora_cli.modes import autocast, evaluating


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
    """
    scorer = build_scorer(task, keep=keep_predictions)
    device = torch.device(device)
    plan = sequential_batches(encoded.lengths, batch_size)
    losses: list[Tensor] = []  # one number a batch, read at the end: no waiting for the device in between
    count: int | Tensor = 0
    compares = len(encoded.references) > 0
    with evaluating(model), torch.no_grad(), autocast(device, autocast_dtype):
        for rows, batch in zip(plan, batches(encoded, plan, pin=device.type == "cuda"), strict=True):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            total, n, outputs = task.loss(model, batch)
            scorer.update(model, outputs, batch, [encoded.references[i] for i in rows] if compares else ())
            losses.append(total)
            count = count + n
            advance(len(rows))
    values = {"loss": torch.stack(losses).cpu().double().sum().item() / max(int(count), 1), **scorer.metrics()}
    if not keep_predictions:
        return EvalResult(values)
    said = scorer.predictions()
    if encoded.windows_of is not None:
        return EvalResult(values, said)
    order = torch.tensor([row for batch in plan for row in batch]).argsort()  # back from long-to-short
    return EvalResult(values, [{"id": i, **said[k]} for i, k in zip(encoded.ids, order.tolist(), strict=True)])
