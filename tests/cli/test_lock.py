"""One process per run folder, and a lock that no dead process leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    with locked(tmp_path):
        pass


def test_where_there_are_no_locks_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, timeout: float) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(lock.FileLock, "acquire", refuse)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_a_damaged_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    for content in ("", "{", "[1]", '{"pid": "x", "host": "y"}', "\udcff"):
        (tmp_path / ".lock").write_bytes(content.encode("utf-8", "surrogateescape"))
        with locked(tmp_path):
            pass
