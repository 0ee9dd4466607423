"""An interrupted run goes on to the very same weights, metrics and ranks."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_cli.checkpoints.manifest import verify_manifest
from dora_cli.cli import train_run

Train = Callable[..., int]
Unplug = Callable[[int], AbstractContextManager[None]]
TIMES = ("samples_per_second",)  # all else in metrics.jsonl must be equal


def outcome(run: Path) -> tuple[list[dict[str, Any]], Any, dict[str, torch.Tensor], dict[str, Any]]:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        for key in TIMES:
            record.pop(key, None)
    summary = json.loads((run / "summary.json").read_text())
    summary["train"] = {k: summary["train"][k] for k in ("steps", "samples", "tokens")}
    return (
        metrics,
        json.loads((run / "ranks.json").read_text()),
        load_file(run / "adapter/adapter_model.safetensors"),
        summary,
    )


@pytest.mark.parametrize(
    ("method", "step"),
    [
        # dora and adalora choose between steps 3 and 12 here, aflora freezes between 1 and 7, alora moves up to 9
        pytest.param("dora", 5, marks=pytest.mark.slow),
        ("dora", 10),
        pytest.param("dora", 20, marks=pytest.mark.slow),
        pytest.param("dora revive", 10, marks=pytest.mark.slow),
        pytest.param("dora_official", 10, marks=pytest.mark.slow),
        ("adalora", 10),
        pytest.param("adalora revive", 5, marks=pytest.mark.slow),
        pytest.param("lora", 10, marks=pytest.mark.slow),
        pytest.param("alora", 5, marks=pytest.mark.slow),
        pytest.param("alora random", 5, marks=pytest.mark.slow),
        pytest.param("aflora", 5, marks=pytest.mark.slow),
        pytest.param("full", 10, marks=pytest.mark.slow),
        ("sora", 10),
        pytest.param("sora", 20, marks=pytest.mark.slow),
        ("elalora", 10),
    ],
)
def test_resuming_gives_the_same_bits(
    method: str, step: int, dora_train: Train, tmp_path: Path, unplugged_at: Unplug
) -> None:
    method, _, variant = method.partition(" ")
    words = [f"method={method}", "train.max_steps=24", "train.save_every=5", "train.eval_every=7", "train.log_every=4"]
    words += ["train.head_learning_rate=0.005"]
    if method != "full":
        words += ["budget=r2", "adapter.rank=4"] if method != "aflora" else ["budget=r2"]
    if method in ("dora", "adalora"):
        words += ["allocator.interval=3", f"allocator.revive={str(variant == 'revive').lower()}"]
    if method == "elalora":
        words += ["allocator.interval=3"]
    if variant == "random":
        words += ["importance=random"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    with unplugged_at(step):
        dora_train(*words, f"out={tmp_path}/cut")
    assert not (tmp_path / "cut/summary.json").exists()
    assert dora_train(*words, f"out={tmp_path}/cut", "resume=true") == 0
    metrics, ranks, tensors, summary = outcome(tmp_path / "whole")
    metrics2, ranks2, tensors2, summary2 = outcome(tmp_path / "cut")
    assert metrics == metrics2
    assert ranks == ranks2
    assert tensors.keys() == tensors2.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, tensors2[name]), name
    assert summary == summary2


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    dora_train: Train, tmp_path: Path, unplugged_at: Unplug, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=lora", "budget=r1", "train.max_steps=20", "train.save_every=5"]
    with unplugged_at(10):
        dora_train(*words)
    newest = tmp_path / "run/checkpoints/step-00000010/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    assert dora_train(*words, "resume=true") == 0
    text = capsys.readouterr().out
    assert "step-00000010" in text
    assert "resuming from" in text
    assert "step-00000005" in text


def test_another_configuration_is_refused_and_logging_keys_are_free(
    dora_train: Train, tmp_path: Path, unplugged_at: Unplug, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=lora", "budget=r1", "train.max_steps=12", "train.save_every=5"]
    with unplugged_at(5):
        dora_train(*words)
    assert dora_train(*words, "train.learning_rate=0.02", "resume=true") == 2
    assert "train.learning_rate" in capsys.readouterr().err
    assert dora_train(*words) == 2
    assert "interrupted" in capsys.readouterr().err
    assert dora_train(*words, "save.which=last", "resume=true") == 2
    assert "save.which" in capsys.readouterr().err
    assert dora_train(*words, "train.log_every=3", "train.keep_last=1", "resume=true") == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_the_run_goes_on_from_there(
    number: signal.Signals, code: int, dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["budget=r1", "adapter.rank=2", "train.max_steps=20", "train.save_every=100", "train.log_every=1"]
    if signal.getsignal(number) is signal.SIG_IGN:  # these tests run under nohup
        signal.signal(number, signal.SIG_DFL)
    real, before = train_run._Run._log, signal.getsignal(number)

    def log_then_signal(self: Any, record: dict[str, Any]) -> None:
        real(self, record)
        if record["step"] == 6:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(train_run._Run, "_log", log_then_signal)
        assert dora_train(*words) == code
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]
    assert signal.getsignal(number) is before
    assert dora_train(*words, "resume=true") == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["train"]["steps"] == 20


def test_resume_without_anything_to_resume_starts(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=lora", "budget=r1", "train.max_steps=2", "resume=true") == 0
    assert (tmp_path / "run/summary.json").exists()


def test_a_run_killed_after_its_merged_model_still_ends(
    dora_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method=lora", "budget=r1", "train.max_steps=4", "train.save_every=2", "save.merged=true"]

    class Unplugged(BaseException):
        pass

    def unplug(*_: Any) -> None:
        raise Unplugged

    with monkeypatch.context() as patch:
        patch.setattr(train_run, "summarise", unplug)
        with pytest.raises(Unplugged):
            dora_train(*words)
    merged = tmp_path / "run/merged"
    first = (merged / "model.safetensors").read_bytes()
    assert dora_train(*words, "resume=true") == 0
    verify_manifest(merged, others=True)  # its card is in none, so that it may be edited
    assert (merged / "model.safetensors").read_bytes() == first
    assert (tmp_path / "run/summary.json").exists()


def test_old_checkpoints_go_and_the_newest_stay(dora_train: Train, tmp_path: Path) -> None:
    assert dora_train("method=lora", "budget=r1", "train.max_steps=20", "train.save_every=3", "train.keep_last=2") == 0
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000015", "step-00000018"]


def test_other_data_is_refused(
    dora_train: Train,
    unplugged: Callable[..., None],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    words = ["method=lora", "budget=r1", "train.max_steps=12", "train.save_every=5", f"data.path={tmp_path}/data"]
    unplugged(5, *words)
    file = tmp_path / "data/train.jsonl"
    before = file.read_text()
    first = before.splitlines(keepends=True)[0]
    for after in (before.replace("plot", "story", 1), before.replace("negative", "positive", 1), before + first):
        file.write_text(after)
        assert dora_train(*words, "resume=true") == 2
        assert "the training data is not the interrupted run's" in capsys.readouterr().err
    file.write_text(before)
    assert dora_train(*words, "resume=true") == 0


def test_what_a_killed_process_left_is_gone_and_a_lost_best_comes_back(
    dora_train: Train, unplugged: Callable[..., None], tmp_path: Path
) -> None:
    words = ["method=lora", "budget=r2", "train.max_steps=20", "train.save_every=5", "train.eval_every=4"]
    assert dora_train(*words, f"out={tmp_path}/whole") == 0
    unplugged(15, *words)
    run = tmp_path / "run"
    (run / ".adapter.tmp-0123ab-1-deadbeef-0").mkdir()
    (run / "checkpoints/.step-00000020.tmp-0123ab-1-deadbeef-1").mkdir()
    shutil.rmtree(run / "adapter")
    (run / "metrics.jsonl").write_text("{")
    assert dora_train(*words, "resume=true") == 0
    assert not [p for p in run.rglob(".*") if ".tmp" in p.name]
    for name in ("adapter/adapter_model.safetensors", "ranks.json"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert outcome(run)[0] == outcome(tmp_path / "whole")[0]
