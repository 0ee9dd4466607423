"""Runs that stream their training rows: the order, exact resume, bad rows on the way, and what is refused."""

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.cli.eval import main as dora_eval
from dora_cli.config.parts import load_parts
from dora_cli.data.batching import LengthGroupedBatches
from dora_cli.training.setup import build

Train = Callable[..., int]
STREAM = ["data.streaming=true", "data.shuffle_buffer=48", "data.labels=[negative,positive]", "seed=3"]
STEPS = ["train.max_steps=30", "train.save_every=7", "train.eval_every=10", "train.log_every=4"]
METHOD = ["method=dora", "budget=r2", "adapter.rank=4", "allocator.interval=3"]


def records(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "samples_per_second"} for record in found]


@pytest.mark.parametrize("step", [7, 14])  # within the second buffer, within a later pass
def test_resuming_gives_the_same_bits(
    step: int, dora_train: Train, unplugged: Callable[..., None], tmp_path: Path
) -> None:
    words = [*STREAM, *STEPS, *METHOD, "train.accumulation=2"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(step, *words, f"out={tmp_path}/cut")
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    one, other = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
