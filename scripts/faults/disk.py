"""A disk that fills up: during checkpoints, the adapter, the logs, a merge, an evaluation.

    sudo python scripts/faults/disk.py [--sizes 24] [--folder DIR] [--json FILE]      (it mounts a small tmpfs)

A run is given a disk of every one of many sizes, from one on which not even the configuration has room to one on which
all of it has. Where it stops it must say so (exit code 1, a message, no traceback), leave no checkpoint with its final
name that is not whole, and once there is room `resume=true` must end where a run that was never short of room ends, to
the byte. Merging and evaluating on a disk too small must leave nothing under the name asked for.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny
from kill import COMMON, METHODS, live, outcome, unfinished

from dora_cli.checkpoints.run_state import newest_checkpoint
from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge

KIB = 1024


@dataclass
class Case:
    what: str
    kib: int
    code: int
    said: str
    step: int  # of the newest whole checkpoint
    verdict: str


@contextmanager
def small_disk(place: Path, kib: int) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def resize(place: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(place)], check=True)


def told(said: str) -> str:
    """The message, or nothing where there is none or a traceback."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return lines[-1] if lines and "Traceback" not in said else ""


def train(folder: Path, kib: int, words: list[str], expected: dict[str, str]) -> Case:
    log = folder / "said"
    log.unlink(missing_ok=True)
    with small_disk(folder / "disk", kib) as disk:
        run = disk / "run"
        code = live([*words, f"out={run}"], log, None)
        said = told(log.read_text(encoding="utf-8"))
        newest, damaged = newest_checkpoint(run / "checkpoints")
        step = int(newest.name.partition("-")[2]) if newest else 0
        wrong = [f"not whole: {text}" for text in damaged]
        if code != 0:
            wrong += [] if code == 1 and "no space left" in said else [f"exit code {code}, said {said!r}"]
            resize(disk, 64 * KIB)
            again = live([*words, f"out={run}", "resume=true"], log, None)
            wrong += [] if again == 0 else [f"resumed with exit code {again}"]
        if not wrong:
            found = outcome(run)
            wrong += [f"{name} differs" for name in expected if found.get(name) != expected[name]]
            wrong += [f"left behind: {path.name}" for path in unfinished(run)]
    return Case("train", kib, code or 0, said, step, "; ".join(wrong) or ("ended" if code == 0 else "went on"))


def derive(folder: Path, kib: int, what: str, run: Path) -> Case:
    """A merge or an evaluation onto the small disk."""
    log = folder / "said"
    log.unlink(missing_ok=True)
    with small_disk(folder / "disk", kib) as disk:
        command = dora_merge if what == "merge" else dora_eval
        code = live([f"checkpoint={run}", f"out={disk / 'new'}"], log, None, command=command)
        said = told(log.read_text(encoding="utf-8"))
        left = sorted(p.name for p in disk.rglob("*") if p.is_file())
        wrong = []
        if code != 0:
            wrong += [] if code == 1 and "no space left" in said else [f"exit code {code}, said {said!r}"]
            wrong += [f"left behind: {name}" for name in left if what == "merge" or name.startswith(".")]
    return Case(what, kib, code or 0, said, 0, "; ".join(wrong) or ("ended" if code == 0 else "refused"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=24, help="how many sizes of disk a run is tried on")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write every case here")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("error: mounting a small disk takes root")
    tiny.before_forks()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        tiny.make(folder)
        words = [*COMMON, f"model.name={folder / 'model'}", f"data.path={folder / 'data'}", *METHODS["dora"]]
        whole = folder / "disk" / "run"  # paths stand in what is written: made where the others are
        with small_disk(folder / "disk", 64 * KIB):
            assert live([*words, f"out={whole}"], folder / "said", None) == 0
            expected = outcome(whole)
            used = sum(p.stat().st_blocks * 512 for p in whole.rglob("*")) // KIB
        done = folder / "done"
        assert live([*words, f"out={done}"], folder / "said", None) == 0
        sizes = sorted({max(4, used * (i + 1) // (options.sizes - 2)) for i in range(options.sizes)})
        cases = [train(folder, kib, words, expected) for kib in sizes]
        cases += [
            derive(folder, kib, what, done) for what in ("merge", "eval") for kib in (4, 8, 16, 32, 64, 128, 4096)
        ]
    for case in cases:
        print(f"{case.what:6} {case.kib:6} KiB  exit {case.code}  step {case.step:3}  {case.verdict}  {case.said[:60]}")
    if options.json:
        options.json.write_text(json.dumps([asdict(case) for case in cases], indent=1), encoding="utf-8")
    return int(any(case.verdict not in ("ended", "went on", "refused") for case in cases))


if __name__ == "__main__":
    sys.exit(main())
