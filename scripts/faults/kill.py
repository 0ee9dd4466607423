"""`kill -9` at random instants of a run, over and over, and where it ends all the same.

    python scripts/faults/kill.py [--kills 100] [--methods NAME …] [--seed 0] [--folder DIR] [--json FILE]

A run on a tiny model is killed, resumed, killed again, until it has ended. The instants are drawn: any moment of the
process's life; in or right after the writing of a checkpoint, of the adapter, of the merged model or of the cache of
tokens; right after an allocation event; inside an evaluation. After each kill every checkpoint, adapter and merged
model that has its final name must be whole; at the end adapter, merged model, metrics, ranks and summary must be those
of a run that nobody disturbed, to the byte, and nothing unfinished may be left.

Processes are forked from this one, which has imported everything: a life takes one or two seconds.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import tiny

from dora_cli.checkpoints.manifest import verify_manifest
from dora_cli.checkpoints.run_state import newest_checkpoint
from dora_cli.cli import train_run
from dora_cli.cli.train import main as dora_train
from dora_cli.data import tokens
from dora_cli.errors import UserError

STEPS = 40
COMMON = [
    "recipe=text_classification", "data.max_length=16", "train.batch_size=8", f"train.max_steps={STEPS}",
    "train.save_every=2", "train.eval_every=5", "train.log_every=1", "train.learning_rate=0.01",
]  # fmt: skip
OFTEN = ["schedule.start=4", "schedule.end=30", "allocator.interval=2"]
SHRINKING = ["budget=r2", "adapter.rank=4", *OFTEN]
METHODS: dict[str, list[str]] = {
    "dora": ["method=dora", *SHRINKING, "adapter.dropout=0.1"],
    "adalora": ["method=adalora", *SHRINKING],
    "increlora": ["method=increlora", "budget=r2", *OFTEN],
    "elalora": ["method=elalora", "budget=r2", *OFTEN],
    "bayesian_lora": ["method=bayesian_lora", "budget=r2", "adapter.rank=4"],
    "lora": ["method=lora", "budget=r2"],
    "dlora": ["method=dlora", "budget=r2", *OFTEN, "allocator.active=0.3", "allocator.choice=probe"],
    "dlora_drop": [
        "method=dlora", "budget=r2", *OFTEN, "allocator.active=0.3", "allocator.killed=drop", "allocator.state=keep",
    ],
    "aflora": ["method=aflora", "budget=r2", *OFTEN, "adapter.freeze_square=false", "importance.window=4"],
    "sora": ["method=sora", "budget=r2", "adapter.rank=4", "schedule.end=30", "allocator.threshold=5e-3"],
    "alora": ["method=alora", "budget=r2", "schedule.start=4", "allocator.interval=3", "importance.rows=8"],
    "mora": ["method=mora", "budget=r2"],
    "mora_components": ["method=mora_components", "budget=r4", "adapter.rank=6", "adapter.square_rank=4", *OFTEN],
    "weight_decomposed": ["method=weight_decomposed", "budget=r2", "adapter.dropout=0.1"],
    "eva": ["method=eva", "budget=r2"],
}  # fmt: skip
KINDS = {"any": 3, "checkpoint": 4, "event": 2, "evaluation": 2, "adapter": 1, "merged": 1, "cache": 0.5}  # how often
PATTERNS = {"checkpoint": "checkpoints/.step-*.tmp-*", "adapter": ".adapter.tmp-*", "merged": "*merged*"}
# So many such moments may pass.
PASSED = {"checkpoint": 6, "event": 6, "evaluation": 3, "adapter": 1, "merged": 1, "writing": 1, "cache": 1}
AFTER = {"evaluation": 0.006}  # seconds that may pass from then on; by default about what a save takes
LONGEST = 120  # seconds that a life may take


@dataclass
class Tally:
    """What a method went through.

    Attributes:
        kills: kind of instant → how many times it was killed then.
        inside: kills that left something unfinished behind.
        ended: runs that came to their end, each compared with the undisturbed one.
        lost: most steps that one kill cost.
        wrong: what must not be.
    """

    kills: Counter[str] = field(default_factory=Counter)
    inside: int = 0
    ended: int = 0
    lost: int = 0
    wrong: list[str] = field(default_factory=list)


def live(
    words: list[str],
    log: Path,
    strike: Callable[[], object] | None,
    *,
    command: Callable[[list[str]], int] = dora_train,
) -> int | None:
    """One life of a run, or of another command, in a process of its own.

    Args:
        strike: returns when the process is to be killed; None lets it live.

    Returns:
        The exit code, or None where it was killed.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST)
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = command(words)
            sys.stdout.flush()
            os._exit(code)
    if strike is not None:
        strike()
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def striker(
    kind: str, watched: Callable[[], Any], draw: random.Random, lifetime: float, seen: list[str], after: float
) -> Callable[[], None]:
    """Wait for an instant of this kind, and put into ``seen`` what it was: one that does not come is any.

    Args:
        watched: changes at such instants, and is empty where there is none.
        after: seconds that may pass from then on.
    """
    anywhere = draw.uniform(0.0, lifetime)
    delay = draw.uniform(0.0, after)
    skip = draw.randint(0, PASSED.get(kind, 0))

    def wait() -> None:
        seen.append("any")
        if kind == "any":
            time.sleep(anywhere)
            return
        end, before, left = time.monotonic() + lifetime, watched(), skip
        while time.monotonic() < end:
            now = watched()
            if now and now != before:
                left -= 1
                if left < 0:
                    time.sleep(delay)
                    seen.append(kind)
                    return
            before = now
            time.sleep(0.0005)

    return wait


def watcher(kind: str, run: Path, cache: Path, marker: Path) -> Callable[[], Any]:
    """What to look at for instants of this kind."""

    def look() -> Any:
        if kind == "evaluation":
            return marker.exists()
        if kind == "event":
            file = run / "metrics.jsonl"
            return file.read_bytes().count(b'"split": "allocation"') if file.exists() else 0
        found = cache.rglob(".*.tmp-*") if kind == "cache" else run.glob(PATTERNS[kind])
        return sorted(path.name for path in found)

    return look


def mark_evaluations(marker: Path) -> None:
    """In the processes forked from here on, let a file be there as long as an evaluation is under way."""
    real = train_run._Run._evaluate

    def evaluate(run: train_run._Run) -> dict[str, dict[str, float]]:
        marker.touch()
        splits = real(run)
        marker.unlink()
        return splits

    train_run._Run._evaluate = evaluate  # type: ignore[method-assign]


def outcome(run: Path) -> dict[str, str]:
    """What must be the same, hashed; times left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in lines:
        record.pop("samples_per_second", None)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for key in ("seconds", "samples_per_second", "tokens_per_second", "peak_rss_mib"):
        summary["train"].pop(key)
    found = {
        "metrics.jsonl": json.dumps(lines).encode(),
        "summary.json": json.dumps(summary).encode(),
        "ranks.json": (run / "ranks.json").read_bytes(),
    }
    for part in ("adapter", "merged"):
        found |= {f"{part}/{p.name}": p.read_bytes() for p in sorted((run / part).glob("*"))}
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def unfinished(run: Path) -> list[Path]:
    return [p for p in run.rglob(".*.tmp*") if p.exists()]


def inspect(run: Path, tally: Tally) -> int:
    """Look at what a kill has left; returns the step of the newest checkpoint."""
    newest, damaged = newest_checkpoint(run / "checkpoints")
    tally.wrong += [f"a checkpoint that is not whole: {text}" for text in damaged]
    for part in ("adapter", "merged"):
        try:
            if (run / part).exists():
                verify_manifest(run / part, others=True)
        except UserError as error:
            tally.wrong.append(f"not whole: {error.message}, {error.where}")
    tally.inside += bool(unfinished(run))
    if (run / "summary.json").exists():
        json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return int(newest.name.partition("-")[2]) if newest else 0


def last_step(run: Path) -> int:
    """The last step that the killed process spoke of."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    whole = [line for line in lines if line.endswith(b"}")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def tiny_run(folder: Path, method: str) -> list[str]:
    """The words of a run on what ``tiny.make`` has put into the folder."""
    places = [f"model.name={folder / 'model'}", f"data.path={folder / 'data'}", f"data.cache={folder / 'cache'}"]
    return [*COMMON, *places, *METHODS[method]]


def before_forks(folder: Path) -> None:
    """Make the tiny model and its data, and import what lives need, so that none has to."""
    tiny.before_forks()
    tokens.CACHED_FROM = 0  # else so few rows are not worth a cache
    tiny.make(folder)
    with redirect_stdout(StringIO()):
        assert dora_train([*tiny_run(folder, "lora"), "dry_run=true"]) == 0  # nothing backward, so no thread of torch's


def campaign(method: str, kills: int, folder: Path, draw: random.Random) -> Tally:
    """Kill runs of one method ``kills`` times."""
    tally, cache, marker, log = Tally(), folder / "cache", folder / "evaluating", folder / f"{method}.log"
    words = [*tiny_run(folder, method), "save.merged=true"]
    whole, run = folder / method / "whole", folder / method / "run"
    begin = time.monotonic()
    assert live([*words, f"out={whole}"], log, None) == 0, f"the undisturbed run failed: see {log}"
    lifetime = time.monotonic() - begin
    expected = outcome(whole)
    kinds = cycle_of(draw)
    while tally.kills.total() < kills or run.exists():
        kind = next(kinds)
        if kind == "cache":
            shutil.rmtree(cache, ignore_errors=True)
        marker.unlink(missing_ok=True)
        seen: list[str] = []
        strike = striker(kind, watcher(kind, run, cache, marker), draw, lifetime, seen, AFTER.get(kind, 0.012))
        code = live([*words, f"out={run}", "resume=true"], log, strike if tally.kills.total() < kills else None)
        if code is None:
            what = "any" if seen[-1] == "evaluation" else seen[-1]  # it was over when the signal came
            tally.kills["evaluation" if marker.exists() else what] += 1
            tally.lost = max(tally.lost, last_step(run) - inspect(run, tally))
        elif code != 0:
            tally.wrong.append(f"exit code {code}: see {log}")
            break
        if (run / "summary.json").exists():
            tally.ended += 1
            if live([*words, f"out={run}", "resume=true"], log, None) != 0:
                tally.wrong.append(f"a finished run is not taken for one: see {log}")
            found = outcome(run)
            tally.wrong += [f"{name} differs" for name in expected if found.get(name) != expected[name]]
            tally.wrong += [f"left behind: {path.name}" for path in unfinished(run) if code is not None]
            if tally.wrong:
                break
            shutil.rmtree(run)
    return tally


def cycle_of(draw: random.Random) -> Iterator[str]:
    """Kinds of instants, most of them inside the writing of checkpoints."""
    while True:
        yield draw.choices(list(KINDS), weights=list(KINDS.values()))[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared out among the methods")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        before_forks(folder)
        mark_evaluations(folder / "evaluating")
        print(f"{'method':18}{'kills':>6}{'unfinished':>12}{'ended':>7}{'lost':>6}  instants; wrong", flush=True)
        for i, method in enumerate(options.methods):
            share = options.kills * (i + 1) // len(options.methods) - options.kills * i // len(options.methods)
            begin = time.monotonic()
            tally = campaign(method, share, folder, random.Random(f"{options.seed} {method}"))
            instants = ", ".join(f"{kind} {n}" for kind, n in sorted(tally.kills.items()))
            print(
                f"{method:18}{tally.kills.total():6}{tally.inside:12}{tally.ended:7}{tally.lost:6}  {instants}; "
                f"{'; '.join(tally.wrong) or 'nothing'} ({time.monotonic() - begin:.0f} s)",
                flush=True,
            )
            results[method] = {**vars(tally), "kills": dict(tally.kills)}
    if options.json:
        options.json.write_text(json.dumps({"settings": {"seed": options.seed}, "results": results}, indent=1))
    return int(any(tally["wrong"] for tally in results.values()))


if __name__ == "__main__":
    sys.exit(main())
