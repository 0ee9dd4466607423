"""Fuzz every parser with hypothesis: budgets, target patterns, adapters, data files, recipes, overrides, checkpoints.

    python scripts/faults/fuzz.py [--targets NAME …] [--examples N] [--seed 0] [--folder DIR] [--json FILE]

An input must give a result or one UserError that says something and fits on a screen, within ten seconds. A result must
hold what its target promises (see ``parsers.py``): an independent reader's values, shapes that agree, numbers in range.
Anything else is wrong, and the smallest input that hypothesis finds is printed. Each target runs in a process of its
own, so that one that takes the interpreter with it ends no other. The same seed gives the same inputs.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import tiny
from hypothesis import HealthCheck, Phase, given, seed, settings
from parsers import TARGETS, Target

from dora_cli.cli.run import MAX_LINES, print_error
from dora_cli.errors import UserError

DEADLINE = 10.0  # seconds for one input
STUCK = 60.0  # seconds after which a process that no alarm reaches is killed
SCREEN = 24 * 80  # characters of a message
MEMORY = 6 << 30  # bytes that a process may take beyond what it starts with


class Wrong(Exception):
    """An input that gave neither a result nor a good message."""


class TooSlow(BaseException):
    """Past the deadline. No Exception, so that nobody catches it and hypothesis does not wait for smaller ones."""


@dataclass
class Found:
    """What came of one target. ``wrong``: the problem and the smallest input, for each that differs."""

    target: str
    examples: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def bad_message(error: UserError) -> str | None:
    """What is wrong with a refusal, if anything."""
    parts = [error.message, *(part for part in (error.where, error.hint) if part is not None)]
    if not all(part.strip() for part in parts):
        return "an empty part of a message"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        print_error(error.message, error.where, error.hint)
    text = said.getvalue()
    lines = text.rstrip("\n").split("\n")
    if len(lines) > MAX_LINES or lines[-1].endswith(" …") or len(text) > SCREEN:
        return f"a message of {len(lines)} lines and {len(text)} characters"
    return None


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    def late(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"it took more than {DEADLINE:g} s, in {frame and frame.f_code.co_qualname}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(target: Target, example: Any, found: Found) -> None:
    """Try one input.

    Raises:
        Wrong: caused by what went wrong, so that hypothesis tells one problem from another.
    """
    begin = time.monotonic()
    found.examples += 1
    try:
        with deadline():
            target.check(example)
        found.accepted += 1
    except UserError as error:
        found.refused += 1
        if problem := bad_message(error):
            raise Wrong(f"{problem}: {str(error)[:300]!r}", shown(example)) from error
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {str(error)[:300]} ({last_call(error)})", shown(example)) from error
    finally:
        found.slowest = max(found.slowest, round(time.monotonic() - begin, 3))


def last_call(error: Exception) -> str:
    """Where it happened, in code that is ours: file, line and function."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
    return f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}, {ours[-1].name}"


def shown(example: Any) -> str:
    text = repr(example)
    return text if len(text) <= 2000 else f"{text[:1500]} … {text[-400:]}"


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def campaign(target: Target, examples: int, first: int, now: Path) -> Found:
    """Try ``examples`` inputs of a target; the one being tried is kept in ``now``."""
    found = Found(target.name)
    tried: list[str] = [""]

    @seed(first)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @given(target.strategy)
    def run(example: Any) -> None:
        tried[0] = shown(example)
        now.write_text(tried[0], encoding="utf-8", errors="backslashreplace")
        judge(target, example, found)

    begin = time.monotonic()
    try:
        run()
    except TooSlow as error:
        found.wrong.append(f"{error}\n    {tried[0]}")
    except BaseException as error:
        for leaf in leaves(error):
            found.wrong.append("\n    ".join(map(str, leaf.args)) if isinstance(leaf, Wrong) else repr(leaf)[:2000])
    found.seconds = round(time.monotonic() - begin, 1)
    return found


def apart(name: str, examples: int | None, first: int, folder: Path) -> Found:
    """``campaign`` in a process of its own, with limited memory and a watch on whether it goes on."""
    now, result = folder / f"{name}.now", folder / f"{name}.json"
    now.write_text("")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with (folder / f"{name}.log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            work = folder / name
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            target = TARGETS[name](work)
            limit_memory()
            found = campaign(target, examples or target.examples, first, now)
            result.write_text(json.dumps(asdict(found)), encoding="utf-8")
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        time.sleep(0.1)
        if time.time() - now.stat().st_mtime > STUCK:
            os.kill(child, signal.SIGKILL)
    if result.exists():
        return Found(**json.loads(result.read_text(encoding="utf-8")))
    code = os.waitstatus_to_exitcode(ended[1])
    said = (folder / f"{name}.log").read_text(errors="replace")[-600:]
    return Found(name, wrong=[f"the process ended with {code}: {said}\n    {now.read_text(encoding='utf-8')}"])


def limit_memory() -> None:
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def preload() -> None:
    """What several targets import, once for all processes."""
    import datasets  # noqa: F401
    from transformers import AutoTokenizer, BertForSequenceClassification  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--examples", type=int, help="for each target; default: what takes each about a minute or two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write what came of each target here")
    options = parser.parse_args()
    tiny.before_forks()
    preload()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(XDG_CACHE_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1")
        os.chdir(folder)
        print(
            f"{'target':14}{'examples':>9}{'accepted':>9}{'refused':>9}{'slowest':>9}{'seconds':>9}  wrong", flush=True
        )
        for name in options.targets:
            found = apart(name, options.examples, options.seed, folder)
            results.append(found)
            print(
                f"{name:14}{found.examples:9}{found.accepted:9}{found.refused:9}{found.slowest:9.2f}{found.seconds:9.1f}"
                f"  {len(found.wrong) or 'nothing'}",
                flush=True,
            )
            for text in found.wrong:
                print(f"  WRONG: {text}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in results], indent=1), encoding="utf-8")
    return int(any(found.wrong for found in results))


if __name__ == "__main__":
    sys.exit(main())
