"""One process per run folder, and a lock that no dead process leaves behind."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dora_cli.cli import lock
from dora_cli.cli.lock import locked
from dora_cli.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from dora_cli.cli.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""
FORK = """
import os, sys, time
from pathlib import Path
from dora_cli.cli.lock import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker, which has the lock too as long as it lives
        time.sleep(2)
        os._exit(0)
    print("held", flush=True)
    time.sleep(100)
"""


def holder(folder: Path, script: str = HOLD) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_has_it(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        for _ in range(2):  # the first refusal leaves things as they are
            with pytest.raises(UserError, match=f"in use by process {process.pid} on ") as caught, locked(tmp_path):
                pytest.fail("both have it")
            assert "out=DIR" in str(caught.value.hint)
    finally:
        process.kill()
        process.wait()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    begin = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begin < 1
    with locked(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes that share a lock")
def test_the_workers_of_a_killed_process_are_waited_for(tmp_path: Path) -> None:
    process = holder(tmp_path, FORK)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "PATIENCE", 0.0)
        with pytest.raises(UserError), locked(tmp_path):
            pytest.fail("the worker still has it")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_there_is_none(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(number, "no flock here")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(tmp_path) as one, locked(tmp_path) as two:
        assert not one and not two


def test_other_failures_are_not_taken_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, how: int) -> None:
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    with pytest.raises(OSError, match="the disk fails"), locked(tmp_path):
        pytest.fail("not held")
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nowhere"):
        pytest.fail("not there")


def test_another_users_lock_file_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def of_another(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "not yours")
        return real(path, flags, mode)

    (tmp_path / lock.NAME).touch()
    process = holder(tmp_path)
    try:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"in use by process {process.pid}"):
            patch.setattr(lock.os, "open", of_another)
            with locked(tmp_path):
                pytest.fail("both have it")
    finally:
        process.kill()
        process.wait()
    monkeypatch.setattr(lock.os, "open", of_another)
    with locked(tmp_path) as held:
        assert held


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x", "host": "y"}', b"\xff", b'{"pid": 1}'])
def test_a_damaged_lock_file_is_no_obstacle(content: bytes, tmp_path: Path) -> None:
    (tmp_path / lock.NAME).write_bytes(content)
    with locked(tmp_path):
        assert b'"pid"' in (tmp_path / lock.NAME).read_bytes()
        (tmp_path / lock.NAME).write_bytes(content)
        with pytest.raises(UserError, match="in use by another process"), locked(tmp_path):
            pytest.fail("both have it")
    assert (tmp_path / lock.NAME).read_bytes() == b""


def test_a_folder_that_is_taken_while_a_run_is_built(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two are started at once: the slower one must not write over what the faster one has made of the folder."""
    from dora_cli.cli import train_run
    from dora_cli.cli.train import main

    real = train_run._build

    def slow(*args: Any) -> Any:
        session = real(*args)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("theirs")
        return session

    monkeypatch.setattr(train_run, "_build", slow)
    words = ["recipe=text_classification", f"model.name={model_dir}", f"data.path={data_dir}", f"out={tmp_path}/run"]
    words.append("data.max_length=16")
    assert main([*words, "resume=true"]) == 2
    assert "was taken by another process" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == "theirs"
