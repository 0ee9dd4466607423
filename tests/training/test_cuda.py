"""What only a GPU shows. Everything else of the suite runs on one too, where there is one (`train.device=auto`)."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.training import loop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Train = Callable[..., int]
COMMON = ["train.device=cuda", "train.max_steps=24", "train.log_every=8", "train.eval_every=24", "train.save_every=8"]
EVENTS = ["schedule.end=16", "allocator.interval=8"]
SHRINKS = ["budget=r2", "adapter.rank=4", *EVENTS]
METHODS = [
    ["lora", "budget=r2"],
    ["dora", *SHRINKS, "schedule.start=8"],
    ["adalora", *SHRINKS, "schedule.start=8"],
    ["increlora", "budget=r2", *EVENTS, "schedule.start=8"],
    ["sora", *SHRINKS],
    ["bayesian_lora", *SHRINKS],
    ["elalora", "budget=r2", *EVENTS, "schedule.start=8"],
    ["dlora", "budget=r2", *EVENTS, "schedule.start=8"],
    ["aflora", "budget=r2", "importance.window=2", *EVENTS, "schedule.start=8"],
    ["weight_decomposed", "budget=r2"],
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("words", METHODS, ids=lambda words: words[0])
def test_the_host_never_waits_between_events_and_logs(
    words: list[str], precision: str, dora_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CUDA's own count of operations that make the host wait; transformers' look at the padding is its own."""
    waits: dict[int, list[str]] = {}
    real, taken = loop.optimizer_step, [0]

    def optimizer_step(*args: Any) -> None:
        taken[0] += 1
        real(*args)

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "synchronizing" in str(message) and not filename.endswith("transformers/masking_utils.py"):
            waits.setdefault(taken[0], []).append(f"{filename}:{lineno}")

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", note)
            assert dora_train(f"method={words[0]}", *words[1:], *COMMON, f"train.precision={precision}") == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {8, 16, 24} <= waits.keys()  # the check sees something
    # Tables of the units are laid out in the first step.
    between = {step: sorted(set(places)) for step, places in waits.items() if step > 1 and step % 8}
    assert not between, between


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("words", METHODS[:3], ids=lambda words: words[0])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(
    words: list[str], compiled: bool, dora_train: Train, unplugged: Callable[..., None], tmp_path: Path
) -> None:
    common = [f"method={words[0]}", *words[1:], *COMMON, "adapter.dropout=0.1", f"train.compile={compiled}"]
    assert dora_train(*common, f"out={tmp_path}/whole") == 0
    unplugged(8, *common)
    assert dora_train(*common, "resume=true") == 0
    one, two = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("run", "whole"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)


def test_a_run_on_the_gpu_is_the_run_on_the_cpu(dora_train: Train, model_dir: Path, tmp_path: Path) -> None:
    """In float32, to what two kinds of sums differ by; the same components live. The base's own dropout is off."""
    base = Path(shutil.copytree(model_dir, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config | quiet))
    words = [f"method={METHODS[1][0]}", *METHODS[1][1:], "train.max_steps=20", "train.log_every=1"]
    words += [f"model.name={base}"]
    runs = {}
    for device in ("cpu", "cuda"):
        assert dora_train(*words, f"train.device={device}", f"out={tmp_path / device}") == 0
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        runs[device] = [r["loss"] for r in map(json.loads, lines) if r["split"] == "train"]
    ranks = [json.loads((tmp_path / d / "summary.json").read_text())["ranks"] for d in runs]
    assert runs["cuda"] == pytest.approx(runs["cpu"], rel=1e-4)
    assert ranks[0] == ranks[1]


def test_peak_memory_is_reported(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=lora", "budget=r2", *COMMON) == 0
    train = json.loads((tmp_path / "run/summary.json").read_text())["train"]
    assert 0 < train["peak_device_mib"] < 2000
