"""A terminal that closes, or a pipe whose reader ends, costs no run."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_cli.cli.train import main

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def words(model_dir: Path, data_dir: Path, tmp_path: Path) -> list[str]:
    """A run of 60 steps that logs every one."""
    words = ["recipe=text_classification", f"data.path={data_dir}", f"model.name={model_dir}", f"out={tmp_path}/run"]
    words += ["data.max_length=16", "train.batch_size=8", "train.log_every=1", "train.eval_every=60", "method=lora"]
    return [*words, "budget=r1", "train.max_steps=60", "resume=true"]


@pytest.fixture
def start(words: list[str]) -> Start:
    def begin(**options: object) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dora_cli.cli.train", *words]
        return subprocess.Popen(command, env=environment, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]

    return begin


def complete(run: Path) -> bool:
    log = (run / "train.log").read_text()
    return json.loads((run / "summary.json").read_text())["train"]["steps"] == 60 and "step 60/60" in log


def read_until(read: Callable[[], bytes], word: bytes) -> None:
    seen = b""
    while word not in seen:
        piece = read()
        assert piece, seen.decode()
        seen += piece


@pytest.mark.parametrize("word", [b"recipe", pytest.param(b"step 2/60", marks=pytest.mark.slow)])
def test_a_run_goes_on_when_the_reader_of_its_pipe_ends(word: bytes, start: Start, tmp_path: Path) -> None:
    """In the plan, as `| head -1` does, or later."""
    process = start(stdout=subprocess.PIPE)
    assert process.stdout is not None
    read_until(process.stdout.readline, word)
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert complete(tmp_path / "run")


@pytest.mark.parametrize("nohup", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_terminal_closes(nohup: bool, start: Start, words: list[str], tmp_path: Path) -> None:
    """Its SIGHUP saves and stops; where that is ignored, the run goes on though nothing can be written any more."""
    ours, side = pty.openpty()

    def own_the_terminal() -> None:
        fcntl.ioctl(side, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    process = start(stdin=side, stdout=side, start_new_session=True, preexec_fn=own_the_terminal)
    os.close(side)
    read_until(lambda: os.read(ours, 4096), b"step 3/60")
    os.close(ours)
    assert process.wait(timeout=120) == (0 if nohup else 128 + signal.SIGHUP)
    if not nohup:
        assert not (tmp_path / "run/summary.json").exists()
        assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1
        assert main(words) == 0
    assert complete(tmp_path / "run")
