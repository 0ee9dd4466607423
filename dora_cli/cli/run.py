"""What every command does around its work: flags, exit codes, messages.

Exit codes (DESIGN 3): 0 success, 2 a user's mistake, 1 anything else, 130 and 143 on Ctrl-C and SIGTERM.
"""

import atexit
import codecs
import errno
import gc
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from types import FrameType

from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

USER_MISTAKE, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143
MAX_LINES = 6
LONG_WORD = re.compile(r"\S{500,}")  # no path of ours; a value, or what stands in a file
LONG_LINE = re.compile(r".{700,}")

FORESEEN = {
    errno.ENOSPC: "free some space, or choose another disk with out=DIR",
    errno.EDQUOT: "your quota is used up: free some space, or choose another disk with out=DIR",
    errno.EROFS: "choose a folder that can be written, with out=DIR",
    errno.EACCES: "choose a folder that you may write and files that you may read",
    errno.EPERM: "choose a folder that you may write and files that you may read",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "a file is to be there: move the folder out of the way",
    errno.ENOTDIR: "a folder is to be there: move the file out of the way",
}
ASCII = {"→": "->", "×": "x", "…": "...", "−": "-", "·": "*", "⇒": "=>", "’": "'", "±": "+-", "≤": "<=", "≥": ">="}
FLAGS = {
    "-h": "help",
    "--help": "help",
    "--version": "version",
    "-m": "multirun",
    "--multirun": "multirun",
    "--config-dir": "config_dirs",
}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What a stream prints instead of characters that its encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in text), error.end


codecs.register_error("in_ascii", _in_ascii)


class HubRetries(logging.Filter):
    """Of the two lines that the hub's client says at each of many tries one remains, and it says what can be done."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "thrown while requesting" not in text and not text.startswith("Retrying in"):
            return True
        if not self.said:
            print("the hub does not answer; trying for a minute (offline=true uses what is here)", file=sys.stderr)
        self.said = True
        return False


class Terminated(BaseException):
    """SIGTERM arrived while nobody else was handling it."""


@dataclass(frozen=True)
class Arguments:
    """argv, with flags apart from ``key=value`` overrides."""

    overrides: list[str]
    config_dirs: list[str]
    help: bool = False
    version: bool = False
    multirun: bool = False


def split_flags(argv: Sequence[str], accepted: Sequence[str] = tuple(FLAGS)) -> Arguments:
    """Take the flags out of argv, wherever they stand.

    Raises:
        UserError: a flag that is not ``accepted``, or ``--config-dir`` without a folder.
    """
    overrides: list[str] = []
    config_dirs: list[str] = []
    seen: set[str] = set()
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in accepted or (equals and FLAGS[flag] != "config_dirs"):
            raise UserError(f"unknown flag '{word}'", hint=did_you_mean(flag, accepted))
        if FLAGS[flag] != "config_dirs":
            seen.add(FLAGS[flag])
            continue
        folder = value if equals else next(words, "")
        if not folder:
            raise UserError("--config-dir needs a folder", hint="write --config-dir DIR")
        config_dirs.append(folder)
    return Arguments(overrides, config_dirs, "help" in seen, "version" in seen, "multirun" in seen)


def answered(arguments: Arguments, help_text: Callable[[], str], explain: Callable[[str], str] | None = None) -> bool:
    """Print the version or the help where that is all that is asked for; says whether it was.

    Args:
        arguments: of the command.
        help_text: all of the help.
        explain: gives the help for one word beside ``--help`` that is no ``key=value``.

    Raises:
        UserError: there is nothing to explain by that word.
    """
    if arguments.version:
        from dora_cli import __version__

        print(f"dora-cli {__version__}")
    elif arguments.help:
        from dora_cli.cli.help import styled, wants_color

        topics = [word for word in arguments.overrides if "=" not in word.rstrip("=")] if explain else []
        texts = [explain(topic) for topic in topics] if explain else []
        print(styled("\n\n".join(texts) or help_text(), color=wants_color(sys.stdout)))
    return arguments.version or arguments.help


def guard(function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command and turn what comes out of it into an exit code.

    Args:
        function: takes argv without the program's name; returns an exit code, or None for success.
        argv: default ``sys.argv[1:]``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="in_ascii")  # a terminal that knows no "→" must not turn help into a traceback
    logging.getLogger("huggingface_hub.utils._http").addFilter(HubRetries())
    atexit.register(gc.freeze)  # else Python walks through all that the libraries made once more, for a second
    try:
        with _sigterm_raises():
            return function(list(sys.argv[1:] if argv is None else argv)) or 0
    except UserError as error:
        print_error(error.message, error.where, error.hint)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Terminated:
        print("terminated", file=sys.stderr)
        return TERMINATED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); what is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        foreseen = _foreseen(error)
        if foreseen is None:
            traceback.print_exc()
        else:
            print_error(*foreseen)
        return FAILURE


def print_error(message: str, where: str | None = None, hint: str | None = None) -> None:
    """``error: …`` on stderr: what is wrong, where, what to do; indented below the first line, at most six lines.

    A terminal gets lines wrapped to its width; a pipe gets them whole.
    """
    sys.stdout.flush()
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else 10_000
    lines: list[str] = []
    for text, most in ((f"error: {message}", 2), (where, 2), (hint, MAX_LINES)):
        for line in _brief(text or "", most):
            indent = "  " if lines else ""
            lines += textwrap.wrap(
                line,
                width,
                initial_indent=indent,
                subsequent_indent=indent + "  ",
                break_long_words=False,
                break_on_hyphens=False,
                replace_whitespace=False,
            )
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1] + " …"]
    print("\n".join(lines), file=sys.stderr)


def _brief(text: str, most: int) -> list[str]:
    """So many lines at most, none very long: a value that was given may be, and must not push the advice away."""
    lines = [line for line in LONG_WORD.sub(_shortened, text).splitlines() if line.strip()]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    return [LONG_LINE.sub(lambda found: f"{found[0][:400]} … {found[0][-200:]}", line) for line in lines]


def _shortened(word: re.Match[str]) -> str:
    return f"{word[0][:60]} … {word[0][-60:]}"


def _foreseen(error: Exception) -> tuple[str, str | None, str] | None:
    """Message, place and advice for failures that are nobody's bug: a full disk, no memory. None for any other."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in FORESEEN:
        path = f"in {error.filename}" if error.filename else None
        told = error.strerror or text
        return told[:1].lower() + told[1:], path, FORESEEN[error.errno]
    if "No space left on device" in text:  # safetensors and arrow wrap the system's error in their own
        return "no space left on device", None, FORESEEN[errno.ENOSPC]
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"OutOfMemoryError", "MemoryError"} or "can't allocate memory" in text:
        first = text.splitlines()[0] if text else None
        return "out of memory", first, "lower train.batch_size or data.max_length, or set train.gradient_checkpointing"
    return None


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that what is open gets closed. Signals belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
