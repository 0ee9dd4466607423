"""Exit codes, messages and flags."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from dora_cli.cli.run import guard, split_flags
from dora_cli.errors import UserError


def raising(error):
    def command(argv):
        raise error

    return command


def test_success_is_zero_and_a_code_is_passed_on():
    assert guard(lambda argv: None, []) == 0
    assert guard(lambda argv: 130, []) == 130


def test_argv_is_handed_over_without_the_programs_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dora-train", "recipe=x"])
    seen = []
    guard(seen.extend)
    assert seen == ["recipe=x"]


def test_a_value_without_end_is_shortened(capsys):
    long = "/" + "x" * 20_000
    assert guard(raising(UserError(f"out={long}: no", where=f"in {'/a' * 200}")), []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out=/xxx")
    assert "xxx: no" in said
    assert "/a" * 200 in said  # a path stays whole
    assert len(said) < 700


def test_a_users_mistake_is_two_and_one_message_without_a_traceback(capsys):
    error = UserError(
        "unknown key 'shedule.start'", where="in mine.yaml, line 7", hint="did you mean 'schedule.start'?"
    )
    assert guard(raising(error), []) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: unknown key 'shedule.start'\n  in mine.yaml, line 7\n  did you mean 'schedule.start'?\n"
    )


def test_no_message_has_more_than_six_lines(capsys):
    assert guard(raising(UserError("first", hint="\n".join(map(str, range(20))))), []) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0] == "error: first" and lines[-1] == "  4 …"


@pytest.mark.parametrize("value", ["word " * 1000, "line\n" * 50])
def test_a_value_of_many_words_or_lines_leaves_room_for_the_advice(capsys, value):
    def fail(argv):
        raise UserError(f"cannot read budget={value}", where="in a file", hint="say r8")

    assert guard(fail, []) == 2
    said = capsys.readouterr().err
    assert len(said) < 1000 and said.count("\n") <= 6
    assert said.startswith("error: cannot read budget=") and said.endswith("say r8\n")


def test_a_terminal_gets_lines_of_its_width(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    guard(raising(UserError("a long message " * 5, hint="/a/path/that/must/not/be/broken/because/it/is/copied")), [])
    lines = capsys.readouterr().err.splitlines()
    assert all(len(line) <= 40 for line in lines[:-1])
    assert lines[-1] == "  /a/path/that/must/not/be/broken/because/it/is/copied"


def test_a_bug_is_one_and_keeps_its_traceback(capsys):
    assert guard(raising(ZeroDivisionError("oops")), []) == 1
    assert "Traceback" in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "error: no space left on device\n  in runs/x\n"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), "error: read-only file system\n  in runs/x\n"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "error: permission denied\n  in runs\n"),
        (
            RuntimeError("IoError(Os { code: 28, message: No space left on device })"),
            "error: no space left on device\n",
        ),
        (MemoryError(), "error: out of memory\n"),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "error: out of memory\n  CUDA out of memory.",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "error: out of memory\n"),
    ],
)
def test_foreseen_failures_are_one_and_a_message(capsys, error, message):
    assert guard(raising(error), []) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert "Traceback" not in printed


def test_other_system_errors_keep_their_traceback(capsys):
    assert guard(raising(OSError("no errno at all")), []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130(capsys):
    assert guard(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_sigterm_is_143_and_unwinds_the_stack():
    closed = []

    def command(argv):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert guard(command, []) == 143
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_goes_away_is_no_traceback():
    code = "import sys; from dora_cli.cli.run import guard; sys.exit(guard(lambda argv: print('x' * 10**6), []))"
    done = subprocess.run(f'{sys.executable} -c "{code}" | head -c 1', shell=True, capture_output=True, text=True)
    assert done.stdout == "x"
    assert done.stderr == ""


def test_flags_may_stand_anywhere():
    arguments = split_flags(["recipe=a", "-m", "--config-dir", "x", "seed=1,2", "--config-dir=y"])
    assert arguments.overrides == ["recipe=a", "seed=1,2"]
    assert arguments.config_dirs == ["x", "y"]
    assert arguments.multirun and not arguments.help
    assert split_flags(["-h"]).help and split_flags(["--multirun"]).multirun and split_flags(["--version"]).version


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--multi-run"], "unknown flag '--multi-run'"),
        (["--help=yes"], "unknown flag '--help=yes'"),
        (["-x"], "unknown flag '-x'"),
        (["--config-dir"], "--config-dir needs a folder"),
    ],
)
def test_unknown_flags_are_refused(argv, message):
    with pytest.raises(UserError) as caught:
        split_flags(argv)
    assert caught.value.message == message


def test_a_command_may_take_fewer_flags():
    with pytest.raises(UserError, match="unknown flag '-m'"):
        split_flags(["-m"], accepted=["-h", "--help"])
