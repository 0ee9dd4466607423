"""Starts that are more than each adapter's own: the passes over training data that they look at, and the filling."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dora_cli.adapters.part import LowRankPart
from dora_cli.data.batching import LengthGroupedBatches, batches
from dora_cli.data.encoded import Encoded
from dora_cli.data.tasks.base import Task
from dora_cli.modes import autocast

IGNORED = -100  # the label of a token that the loss leaves out


def passes(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    plan: LengthGroupedBatches,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Iterator[tuple[Tensor | Sequence[Tensor], Callable[[], object]]]:
    """For each training batch of the first epoch: which of its tokens (n, s) are real, and its forward pass.

    ``dtype`` is what the pass is cast to, as in training.
    """

    def run(batch: dict[str, Tensor]) -> None:
        with autocast(device, dtype):
            task.loss(model, batch)

    for batch in batches(encoded, plan.epoch(0)):
        batch = {k: v.to(device) for k, v in batch.items()}
        yield real_tables(batch), partial(run, batch)


def real_tables(batch: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """Which positions are real of what is read (n, s), and of what is written (n, t) where that is another text; where
    both have one shape, which nobody could tell apart, those that are real in both."""
    read, written = real_tokens(batch), batch.get("decoder_attention_mask")
    if written is None:
        return read
    return (read, written.bool()) if written.shape != read.shape else read & written.bool()


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions (n, s) of a batch are real: no padding, and where each token has a label, those that count."""
    real, labels = batch["attention_mask"].bool(), batch.get("labels")
    beside = "decoder_attention_mask" in batch  # labels of what is to be written, not of what is read
    per_token = labels is not None and labels.shape == real.shape and not beside
    return real & (labels != IGNORED) if per_token else real


def fill(start: Any, layers: Mapping[str, Any], adapter: Any, asked: Mapping[str, int]) -> None:
    """Start the factors. The scale alpha / rank stays that of the rank asked for, wherever ranks have moved."""
    for name, layer in layers.items():
        start.fill(name, layer)
        if isinstance(adapter, LowRankPart):
            layer.scale = adapter.scale(asked[name])
