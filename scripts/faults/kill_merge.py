"""`kill -9` at random instants of `dora-merge` and `dora-eval`, over and over, and where they end all the same.

    python scripts/faults/kill_merge.py [--kills 60] [--commands NAME …] [--seed 0] [--folder DIR] [--json FILE]

A finished run of a tiny model is merged into its base, whole or split into several files, and evaluated: as a run, as
an adapter, and merged. A command is killed up to three times, at any moment or in the writing of what it makes, and
then let end. After each kill every output must be what it was before (nothing, an empty folder, older files) or what an
undisturbed command writes, to the byte; base, adapter, run and data must be untouched. At the end nothing unfinished
may be left.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill import Tally, before_forks, live, striker, tiny_run, unfinished

from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge

EVALUATED = ("eval-validation.json", "predictions-validation.jsonl")
KINDS = {"any": 1, "writing": 2}  # how often
ABSENT, EMPTY, OLD = "absent", "empty", b'{"old": true}\n'
SHARD = 8_000  # bytes, of the split base and of what is made of it


@dataclass
class Command:
    """A command that is killed.

    Attributes:
        outputs: each of them must be as before, or whole.
        after: seconds from something written, or begun, within which it is killed.
    """

    call: Callable[[list[str]], int]
    words: list[str]
    outputs: list[Path]
    after: float

    @property
    def merges(self) -> bool:
        return self.call is dora_merge


def commands(folder: Path) -> dict[str, Command]:
    run, new, merged = folder / "run", folder / "new", folder / "merged"
    recipe = f"recipe={run / 'config.yaml'}"
    split = [f"base={folder / 'split'}", f"shard_size={SHARD}"]

    def evaluation(checkpoint: Path, *more: str, out: Path = new) -> Command:
        words = [f"checkpoint={checkpoint}", *more, f"out={out}"]
        return Command(dora_eval, words, [out / name for name in EVALUATED], 0.002)

    return {
        "merge": Command(dora_merge, [f"checkpoint={run}", f"out={new}"], [new], 0.05),
        "merge split": Command(dora_merge, [f"checkpoint={run / 'adapter'}", f"out={new}", *split], [new], 0.1),
        "eval run": evaluation(run, out=run),
        "eval adapter": evaluation(run / "adapter"),
        "eval merged": evaluation(merged, recipe),
    }


def prepare(folder: Path) -> None:
    """The tiny model, whole and split, its data, a finished run, and the model merged of it."""
    from transformers import BertModel

    before_forks(folder)
    BertModel.from_pretrained(folder / "model").save_pretrained(folder / "split", max_shard_size=SHARD)
    assert len(list((folder / "split").glob("*.safetensors"))) > 2
    for file in (folder / "model").glob("*token*"):
        shutil.copy(file, folder / "split")
    log = folder / "log"
    words = [*tiny_run(folder, "dora"), "train.max_steps=8", "schedule.end=6", f"out={folder / 'run'}"]
    assert live(words, log, None) == 0, f"see {log}"
    words = [f"checkpoint={folder / 'run'}", f"out={folder / 'merged'}"]
    assert live(words, log, None, command=dora_merge) == 0, f"see {log}"


def state(path: Path) -> str:
    """A digest of a file or of all that a folder holds."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ABSENT
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest() if files else EMPTY


def inputs(folder: Path, command: Command) -> dict[str, str]:
    """What must not be touched: outputs may lie in a run's folder, and what a kill leaves there beside them."""
    found = {}
    for part in ("model", "split", "data", "run", "merged"):
        for file in (p for p in (folder / part).rglob("*") if p.is_file()):
            if file not in command.outputs and ".tmp-" not in file.name:
                found[str(file.relative_to(folder))] = state(file)
    return found


def begin(command: Command, draw: random.Random) -> None:
    """Outputs away, or an empty folder or older files in their places."""
    older = draw.random() < 0.5
    for path in command.outputs:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if older:
            (path if command.merges else path.parent).mkdir(exist_ok=True)
            if not command.merges:
                path.write_bytes(OLD)


def campaign(name: str, kills: int, folder: Path, draw: random.Random) -> Tally:
    """Kill one command ``kills`` times."""
    tally, command, log = Tally(), commands(folder)[name], folder / f"{name.replace(' ', '_')}.log"
    untouched = inputs(folder, command)
    start = time.monotonic()
    begin(command, random.Random(0))
    assert live(command.words, log, None, command=command.call) == 0, f"the undisturbed command failed: see {log}"
    lifetime = 1.5 * (time.monotonic() - start)  # another one may be slower
    whole = [state(path) for path in command.outputs]

    def look() -> Any:
        """What is being written, and what has been."""
        found = [p for output in command.outputs for p in (output, *output.parent.glob(f".{output.name}.tmp-*"))]
        return sorted(
            p.name if p not in command.outputs else f"{p.name} {p.stat().st_ino}" for p in found if p.exists()
        )

    while tally.kills.total() < kills and not tally.wrong:
        begin(command, draw)
        before = [state(path) for path in command.outputs]
        for _ in range(min(draw.randint(1, 3), kills - tally.kills.total())):
            kind = draw.choices(list(KINDS), weights=list(KINDS.values()))[0]
            seen: list[str] = []
            strike = striker(kind, look, draw, lifetime, seen, command.after)
            code = live(command.words, log, strike, command=command.call)
            if code is None:
                tally.kills[seen[-1]] += 1
                tally.inside += bool(unfinished(folder))
            elif code != 0:
                tally.wrong.append(f"exit code {code} of what was to be killed: see {log}")
            found = [state(path) for path in command.outputs]
            for path, now, was, right in zip(command.outputs, found, before, whole, strict=True):
                tally.wrong += [] if now in (was, right) else [f"{path.name} is neither as before nor whole"]
            if command.merges and found == whole:
                break  # a second merge into it is refused
        tally.ended += 1
        tally.wrong += finish(command, log, whole)
        tally.wrong += [f"left behind: {path.name}" for path in unfinished(folder)]
        after = inputs(folder, command)
        touched = sorted(n for n in untouched.keys() | after.keys() if untouched.get(n) != after.get(n))
        tally.wrong += [f"touched: {file}" for file in touched]
    return tally


def finish(command: Command, log: Path, whole: list[str]) -> list[str]:
    """Run it once more and let it end; returns what is wrong."""
    refused = command.merges and [state(path) for path in command.outputs] == whole
    code = live(command.words, log, None, command=command.call)
    wrong = [] if code == (2 if refused else 0) else [f"exit code {code} at the end: see {log}"]
    differing = [path for path, right in zip(command.outputs, whole, strict=True) if state(path) != right]
    return wrong + [f"{path.name} differs" for path in differing]


def main() -> int:
    names = list(commands(Path()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="in all, shared out among the commands")
    parser.add_argument("--commands", nargs="+", default=names, choices=names)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work, empty; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        prepare(folder)
        print(f"{'command':14}{'kills':>6}{'unfinished':>12}{'ended':>7}  instants; wrong", flush=True)
        for i, name in enumerate(options.commands):
            share = options.kills * (i + 1) // len(options.commands) - options.kills * i // len(options.commands)
            start = time.monotonic()
            tally = campaign(name, share, folder, random.Random(f"{options.seed} {name}"))
            instants = ", ".join(f"{kind} {n}" for kind, n in sorted(tally.kills.items()))
            print(
                f"{name:14}{tally.kills.total():6}{tally.inside:12}{tally.ended:7}  {instants}; "
                f"{'; '.join(tally.wrong) or 'nothing'} ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
            results[name] = {**vars(tally), "kills": dict(tally.kills)}
            results[name].pop("lost")  # there are no steps
    if options.json:
        options.json.write_text(json.dumps({"settings": {"seed": options.seed}, "results": results}, indent=1))
    return int(any(tally["wrong"] for tally in results.values()))


if __name__ == "__main__":
    sys.exit(main())
