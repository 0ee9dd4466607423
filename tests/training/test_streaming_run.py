"""Runs that stream their training rows: exact resume, bad rows on the way, what is refused, and what is held out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.cli.eval import main as dora_eval

Train = Callable[..., int]
STREAM = ["data.streaming=true", "data.shuffle_buffer=48", "data.labels=[negative,positive]", "seed=3"]
STEPS = ["train.max_steps=14", "train.save_every=7", "train.eval_every=14", "train.log_every=4"]
METHOD = ["method=dora", "budget=r2", "adapter.rank=4", "allocator.interval=3"]


def records(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "samples_per_second"} for record in found]


def test_resuming_gives_the_same_bits(dora_train: Train, unplugged: Callable[..., None], tmp_path: Path) -> None:
    words = [*STREAM, *STEPS, *METHOD, "train.accumulation=2"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(7, *words, f"out={tmp_path}/cut")
    state = json.loads((tmp_path / "cut/checkpoints/step-00000007/state.json").read_text())["stream"]
    # Twelve batches are a pass over 96 rows.
    assert [state[key] for key in ("count", "buffer", "row", "taken")] == [14, 2, 0, 2]
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    assert records(tmp_path / "whole") == records(tmp_path / "cut")
    one, other = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_bad_row_is_met_late_and_a_mended_file_goes_on(
    dora_train: Train, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join([*lines[:90], '{"text": 5, "label": "positive"}\n', *lines[90:]]))
    words = [*STREAM, "method=lora", "budget=r1", f"data.path={data}", "train.max_steps=10", "train.save_every=5"]
    words += ["data.shuffle_buffer=32"]
    assert dora_train(*words) == 2
    assert f"'text' is no text (int)\n  {data / 'train.jsonl'}, line 91" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoints/step-00000005").is_dir()
    (data / "train.jsonl").write_text("".join(lines[:60] + lines[61:]))  # what the position lies in has changed
    assert dora_train(*words, "resume=true") == 2
    assert "the rows from number 33 on have other tokens" in capsys.readouterr().err
    (data / "train.jsonl").write_text("".join(lines))
    assert dora_train(*words, "resume=true") == 0


def test_a_row_without_a_finite_loss_is_found_in_its_buffer(
    dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"good {'bad ' * (i % 5)}", "label": 0.5 if i != 77 else 3e38} for i in range(120)]
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data.task=regression", "data.streaming=true", "data.shuffle_buffer=30", f"data.path={path}"]
    words += [
        "data.max_eval_samples=4",
        "data.metrics=[mse]",
        "method=lora",
        "budget=r1",
        "train.max_steps=14",
        "train.max_skipped=0",
    ]
    assert dora_train(*words) == 2
    assert f"the first: {path}, line 78" in capsys.readouterr().err


def test_an_evaluation_takes_the_rows_that_were_held_out(dora_train: Train, data_dir: Path, tmp_path: Path) -> None:
    words = [*STREAM, "method=lora", "budget=r1", f"data.path={data_dir / 'train.jsonl'}", "data.max_eval_samples=10"]
    assert dora_train(*words, "train.max_steps=4") == 0
    run = tmp_path / "run"
    assert dora_eval([f"checkpoint={run}"]) == 0
    said = [json.loads(line) for line in (run / "predictions-validation.jsonl").read_text().splitlines()]
    assert [row["id"] for row in said] == list(range(10))
    found = json.loads((run / "eval-validation.json").read_text())["metrics"]
    assert found["loss"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["metrics"]["validation"]["loss"]
    )
    assert dora_eval([f"checkpoint={run}", "split=train"]) == 2
    assert dora_eval([f"checkpoint={run}", "split=train", f"data.path={data_dir / 'train.jsonl'}"]) == 0
    assert json.loads((run / "eval-train.json").read_text())["rows"] == 96


REFUSED = {
    "no number of steps": (["train.max_steps=null"], "needs train.max_steps"),
    "workers": (["train.workers=2"], "set train.workers=0"),
    "labels to be read": (["data.labels=null"], "list them in data.labels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_streamed_is_refused(
    what: str, dora_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[what]
    assert dora_train("train.max_steps=4", *STREAM, "method=lora", "budget=r1", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
