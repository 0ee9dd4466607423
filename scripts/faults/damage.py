"""Damage each file of checkpoints, adapters, merged models, bases and run folders in many ways, and see who notices.

    python scripts/faults/damage.py [--cases 600] [--seed 0] [--folder DIR] [--json FILE]

Each case is a copy with one file emptied, deleted, cut short, with zeros at its end, with one bit flipped, with bytes
after its end, exchanged with its neighbour, or turned into a folder. Then the commands that read it are run. A case is
`refused` (exit code 2 and a message), `harmless` (the very result of the undamaged one), `unknowable` (one bit in a
base's files, which carry no hashes), or wrong: a traceback, another exit code, or another result without a word.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny
from kill import live, outcome

from dora_cli.cli import train_run
from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge
from dora_cli.cli.train import main as dora_train

COMMON = [
    "recipe=text_classification", "method=dora", "budget=r2", "adapter.rank=4", "schedule.start=2", "schedule.end=8",
    "allocator.interval=2", "data.max_length=16", "train.batch_size=8", "train.max_steps=16", "train.save_every=2",
    "train.eval_every=4", "train.log_every=1", "train.learning_rate=0.01",
]  # fmt: skip
CUT = 12  # the step after whose checkpoint the interrupted run was interrupted


@dataclass
class Case:
    file: str
    damage: str
    command: str
    code: int
    verdict: str
    said: str


# ---- damage ------------------------------------------------------------------------------------------------------
def empty(file: Path, draw: random.Random) -> None:
    file.write_bytes(b"")


def delete(file: Path, draw: random.Random) -> None:
    file.unlink()


def cut_short(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))] if content else b"")


def cut_one(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def zeros(file: Path, draw: random.Random) -> None:
    """What a crash leaves of a file that was not flushed."""
    content = file.read_bytes()
    kept = draw.randrange(len(content) or 1)
    file.write_bytes(content[:kept] + bytes(len(content) - kept))


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"x")
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def append(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes() + draw.randbytes(17))


def exchange(file: Path, draw: random.Random) -> None:
    """With another file of its folder."""
    others = sorted(p for p in file.parent.iterdir() if p.is_file() and p != file)
    other = draw.choice(others) if others else file
    mine, its = file.read_bytes(), other.read_bytes()
    file.write_bytes(its)
    other.write_bytes(mine)


def folder_instead(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    empty, delete, cut_one, zeros, append, exchange, folder_instead, *[cut_short] * 3, *[flip] * 5,
]  # fmt: skip


# ---- what is damaged, and who reads it ---------------------------------------------------------------------------
@dataclass
class Reader:
    """A command, and the hash of what it gives."""

    name: str
    call: Callable[[Path], tuple[Callable[[list[str]], int], list[str]]]
    result: Callable[[Path], str]


def hashed(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def of_eval(folder: Path) -> str:
    record = json.loads((folder / "eval" / "eval-validation.json").read_text(encoding="utf-8"))
    return json.dumps(record["metrics"]) + hashed(folder / "eval" / "predictions-validation.jsonl")


def words(folder: Path) -> list[str]:
    return [*COMMON, f"model.name={folder / 'model'}", f"data.path={folder / 'data'}", f"data.cache={folder / 'cache'}"]


READERS = {
    "resume": Reader(
        "resume",
        lambda f: (dora_train, [*words(f), f"out={f / 'cut'}", "resume=true"]),
        lambda f: json.dumps({k: v for k, v in outcome(f / "cut").items() if "method.json" not in k}),
    ),
    "eval": Reader("eval", lambda f: (dora_eval, [f"checkpoint={f / 'done'}", f"out={f / 'eval'}"]), of_eval),
    "eval merged": Reader(
        "eval merged",
        lambda f: (
            dora_eval,
            [f"checkpoint={f / 'done/merged'}", f"recipe={f / 'done/config.yaml'}", f"out={f / 'eval'}"],
        ),
        of_eval,
    ),
    "merge": Reader(
        "merge",
        lambda f: (dora_merge, [f"checkpoint={f / 'done'}", f"out={f / 'new'}"]),
        lambda f: hashed(f / "new/model.safetensors", f / "new/config.json"),
    ),
    "again": Reader(
        "again",
        lambda f: (dora_train, [*words(f), "save.merged=true", f"out={f / 'done'}", "resume=true"]),
        lambda f: "",
    ),
}


def readers(file: str) -> list[str]:
    """Who reads a file, by where it lies."""
    if file.startswith("cut/"):
        return ["resume"]
    if file.startswith("done/adapter/"):
        return ["eval", "merge"]
    if file.startswith("done/merged/"):
        return ["eval merged"]
    if file.startswith("done/"):
        return ["again", "eval"]
    return ["eval", "merge"] if file.startswith("model/") else ["eval"]


def prepare(folder: Path) -> None:
    """A finished run, one that was cut off, their base and data, all under ``folder``."""
    tiny.make(folder)
    assert live([*words(folder), f"out={folder / 'done'}", "save.merged=true"], folder / "log", None) == 0
    real = train_run.save_checkpoint

    def save(*args: object, **options: object) -> Path:
        path = real(*args, **options)  # type: ignore[arg-type]
        if args[1] == CUT:
            os._exit(77)
        return path

    train_run.save_checkpoint = save  # type: ignore[assignment]
    assert live([*words(folder), f"out={folder / 'cut'}"], folder / "log", None) == 77
    train_run.save_checkpoint = real


def attempt(reader: Reader, folder: Path) -> tuple[int, str, str]:
    """Exit code, what was said, and the result."""
    log = folder / "said"
    log.unlink(missing_ok=True)
    command, arguments = reader.call(folder)
    code = live(arguments, log, None, command=command)
    assert code is not None
    said = log.read_text(encoding="utf-8", errors="replace")
    return code, said, reader.result(folder) if code == 0 else ""


def judge(case_file: str, damage: str, code: int, said: str, same: bool) -> str:
    if "Traceback" in said or code not in (0, 1, 2):
        return "WRONG: a traceback" if "Traceback" in said else f"WRONG: exit code {code}"
    if code:  # 1 where the disk is to blame, such as a folder that stands in a file's place
        return (
            "refused" if "error: " in said and len(said.strip().splitlines()) < 40 else "WRONG: refused without a word"
        )
    if same:
        return "harmless"
    return (
        "unknowable"
        if case_file.startswith("model/") and damage == "flip"
        else "WRONG: another result, and nothing said"
    )


def campaign(source: Path, work: Path, cases: int, seed: int) -> list[Case]:
    """Damage and try: every file in every way first, then bits and ends at random until there are ``cases``."""
    expected = {}
    for name, reader in READERS.items():
        shutil.copytree(source, work, symlinks=True)
        code, said, expected[name] = attempt(reader, work)
        assert code == 0, said
        shutil.rmtree(work)
    files = sorted(
        str(p.relative_to(source))
        for part in ("cut", "done", "model")
        for p in (source / part).rglob("*")
        if p.is_file()
    )
    todo = [(file, damage) for file in files for damage in DAMAGES]
    draw = random.Random(seed)
    draw.shuffle(todo)
    done: list[Case] = []
    for file, damage in todo[:cases]:
        for name in readers(file):
            shutil.copytree(source, work, symlinks=True)
            damage(work / file, draw)
            code, said, result = attempt(READERS[name], work)
            verdict = judge(file, damage.__name__, code, said, result == expected[name])
            lines = [line for line in said.splitlines() if "error" in line.lower() or "damaged" in line] or [""]
            done.append(Case(file, damage.__name__, name, code, verdict, lines[0][-200:]))
            if verdict.startswith("WRONG"):
                print(
                    f"{verdict}: {file}, {damage.__name__}, {name}: {' | '.join(said.strip().splitlines()[-4:])[-400:]}"
                )
                sys.stdout.flush()
            shutil.rmtree(work)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600, help="files damaged; some are read by two commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write every case here")
    options = parser.parse_args()
    tiny.before_forks()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        # Paths stand in what is written: the copies lie where the original was made.
        work, source = folder / "work", folder / "source"
        folder.mkdir(parents=True, exist_ok=True)
        prepare(work)
        shutil.move(work, source)
        found = campaign(source, work, options.cases, options.seed)
    table = Counter((case.file.split("/step-")[0].rpartition("/")[0] or case.file, case.verdict) for case in found)
    for (place, verdict), n in sorted(table.items()):
        print(f"{place:20}{verdict:40}{n:5}")
    totals = Counter(case.verdict.split(":")[0] for case in found)
    print(f"{len(found)} cases in {time.monotonic() - begin:.0f} s: {dict(totals)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(case) for case in found], indent=1), encoding="utf-8")
    return int(any(case.verdict.startswith("WRONG") for case in found))


if __name__ == "__main__":
    sys.exit(main())
