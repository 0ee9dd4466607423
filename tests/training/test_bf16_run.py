"""Training in bfloat16: the frozen base at half its memory, what trains in float32, results close to float32's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.cli import train_run
from dora_cli.training import plan, setup

Train = Callable[..., int]
OPTIONS = ["budget=r1", "adapter.rank=2", "train.max_steps=20", "train.log_every=1", "adapter.dropout=0.1"]


def losses_of(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r.get("split") == "train"]


def test_losses_follow_those_of_float32(dora_train: Train, tmp_path: Path) -> None:
    losses = []
    fast = ["method=lora", "train.learning_rate=0.05"]
    for precision in ("fp32", "bf16"):
        assert dora_train(*OPTIONS, *fast, f"train.precision={precision}", f"out={tmp_path / precision}") == 0
        losses.append(losses_of(tmp_path / precision))
    assert max(losses[0]) - min(losses[0]) > 0.05  # it does move
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    adapter = load_file(tmp_path / "bf16/adapter/adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}


def test_the_frozen_base_is_held_in_bfloat16_and_what_trains_in_float32(
    dora_train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []

    def build(*args: Any) -> Any:
        built.append(setup.build(*args))
        return built[0]

    monkeypatch.setattr(train_run, "build", build)
    assert dora_train(*OPTIONS, "train.precision=bf16") == 0
    model = built[0].model
    trained = {id(p) for p in built[0].trained_parameters().values()}
    assert trained
    assert all(p.dtype == (torch.float32 if id(p) in trained else torch.bfloat16) for p in model.parameters())


@pytest.mark.parametrize("words", [["method=alora"], ["method=eva"], ["method=bitfit"], ["method=full"]])
def test_what_runs_the_model_beside_the_loop_runs_it_alike(words: list[str], dora_train: Train, tmp_path: Path) -> None:
    """ALoRA's probe, EVA's passes; BitFit, where norms train in part; and full fine-tuning, where nothing is frozen."""
    budget = [] if words[0] in ("method=full", "method=bitfit") else ["budget=r1"]
    assert dora_train(*words, *budget, "train.max_steps=10", "train.precision=bf16") == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["train"]["steps"] == 10


def test_a_resumed_run_ends_alike(dora_train: Train, unplugged: Callable[..., None], tmp_path: Path) -> None:
    words = [*OPTIONS, "train.precision=bf16", "train.save_every=5"]
    assert dora_train(*words, f"out={tmp_path / 'whole'}") == 0
    unplugged(10, *words)
    assert dora_train(*words, "resume=true") == 0
    one, other = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("features", "warned"), [("flags: fma avx2", True), ("flags: avx512_bf16", False)])
def test_the_plan_says_where_bfloat16_is_slow(
    features: str,
    warned: bool,
    dora_train: Train,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cpuinfo").write_text(features)
    monkeypatch.setattr(plan, "CPU_INFO", tmp_path / "cpuinfo")
    assert dora_train("train.precision=bf16", "train.max_steps=1", "train.device=cpu") == 0
    assert ("no bfloat16 units" in " ".join(capsys.readouterr().out.split())) == warned
