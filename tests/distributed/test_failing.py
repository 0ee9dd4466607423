"""What becomes of processes that are told different things, of those that fail alike, and of those left behind."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dora_cli.checkpoints.manifest import verify_manifest

pytestmark = pytest.mark.dist
Start = Callable[..., Any]
LONG = ["method=dora", "budget=r2", "train.max_steps=3000", "train.save_every=5", "train.eval_every=1000"]


def until_saved(out: Path, process: Any) -> None:
    """Wait for the second checkpoint."""
    while len(list(out.glob("checkpoints/step-*"))) < 2:
        assert process.exitcode is None
        time.sleep(0.02)


def test_processes_that_disagree(start: Start, tmp_path: Path) -> None:
    ended = start("method=lora", f"out={tmp_path}/run", each=[["budget=r2"], ["budget=r3"]]).ends()
    assert [e.code for e in ended] == [2, 2]
    assert "not started with the same configuration" in ended[0].err
    assert "process 0 → process 1: budget: r2 → r3" in ended[0].err
    assert ended[1].err == ""
    assert not (tmp_path / "run").exists()


def test_other_data_on_another_machine(start: Start, data_dir: Path, tmp_path: Path) -> None:
    """The same words, and a file that holds something else there."""
    lines = (data_dir / "train.jsonl").read_text().splitlines()
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "train.jsonl").write_text("\n".join(lines[: 40 + rank]))
    words = ["method=lora", "budget=r2", "data.path=train.jsonl", f"out={tmp_path}/run"]
    ended = start(*words, first=lambda rank: os.chdir(tmp_path / str(rank))).ends()
    assert [e.code for e in ended] == [2, 2]
    assert "do not agree on the data" in ended[0].err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=lora", "budgte=r2"], "budgte"),
        (["method=lora", "budget=r2", "data.columns.label=nothing"], "nothing"),
        (["method=lora", "budget=r2", "train.batch_size=1"], "train.batch_size=1 is shared out among 2 processes"),
        (["method=full", "train.shard=full"], "train.shard=full splits the frozen base"),
        (["method=lora", "budget=r2", "-m"], "torchrun starts the processes of one run"),
    ],
)
def test_a_mistake_of_all_is_said_once(words: list[str], message: str, start: Start, tmp_path: Path) -> None:
    ended = start(*words, f"out={tmp_path}/run").ends()
    assert [e.code for e in ended] == [2, 2]
    said = [e.err for e in ended if e.err]
    assert len(said) == 1
    assert message in said[0]
    assert "Traceback" not in said[0]
    assert not (tmp_path / "run").exists()


def test_a_loss_that_diverges_is_said_once(start: Start, tmp_path: Path) -> None:
    words = ["method=lora", "budget=r2", "train.learning_rate=1e30", "train.clip_norm=null", "train.max_steps=30"]
    ended = start(*words, "train.max_skipped=2", "train.log_every=1", f"out={tmp_path}/run").ends()
    assert [e.code for e in ended] == [2, 2]
    assert len([e.err for e in ended if e.err]) == 1


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_killed(victim: int, start: Start, tmp_path: Path) -> None:
    """The other one ends by itself, with a message; what was saved goes on."""
    out = tmp_path / "run"
    started = start(*LONG, f"out={out}")
    until_saved(out, started.processes[0])
    os.kill(started.processes[victim].pid, signal.SIGKILL)
    begin = time.monotonic()
    ended = started.ends(60)
    assert time.monotonic() - begin < 30
    assert ended[victim].code == -signal.SIGKILL
    other = ended[1 - victim]
    assert other.code == 1
    assert "has lost the others of this run" in other.err and "resume=true" in other.err
    assert "Traceback" not in other.err
    newest = max(out.glob("checkpoints/step-*"))
    verify_manifest(newest)
    step = int(newest.name[5:]) + 5
    again = start(*LONG, f"out={out}", "resume=true", unplugged_at=step).ends()
    assert f"resuming from {newest}" in again[0].out
    assert (out / f"checkpoints/step-{step:08d}").is_dir()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_a_signal_to_one_stops_all_after_saving(number: signal.Signals, start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    started = start(*LONG, "train.save_every=100000", "train.log_every=1", f"out={out}")
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        time.sleep(0.02)
    os.kill(started.processes[1].pid, number)
    ended = started.ends(60)
    assert [e.code for e in ended] == [128 + number] * 2
    (checkpoint,) = out.glob("checkpoints/step-*")
    step = json.loads((checkpoint / "state.json").read_text())["progress"]["step"]
    assert f"saved step {step}; go on with resume=true" in ended[0].out
