"""Hostile overrides, recipes, data files and arguments: each ends in success or in one clear message.

    python scripts/faults/hostile.py [--kinds KIND …] [--overrides 250] [--seed 0] [--folder DIR] [--json FILE]

Right is exit code 0, or 2 with `error: …` on one screen. A traceback, another code, or pages of text are wrong, and so
is anything that takes longer than a minute. Runs are dry: the plan is made, nothing is trained.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny
from kill import live

from dora_cli.cli.eval import main as dora_eval
from dora_cli.cli.merge import main as dora_merge
from dora_cli.cli.parts import load_parts
from dora_cli.cli.train import main as dora_train
from dora_cli.config.check import known_keys
from dora_cli.config.compose import root_schema

KINDS = ("override", "data", "recipe", "arguments", "merge", "eval")
SCREEN = 24  # lines
LONGEST = 60.0  # seconds

VALUES = [
    "banana",
    "",
    "null",
    "-1",
    "0",
    "1",
    "3.7",
    "nan",
    "inf",
    "-inf",
    "1e309",
    "1e-400",
    "99999999999999999999999",
    "[]",
    "{}",
    "[1,2",
    "{a:1}",
    "true",
    "'quoted'",
    "???",
    "${oc.env:HOME}",
    "${seed}",
    "$HOME",
    "../../etc/passwd",
    "/dev/null",
    "/dev/full",
    "a=b=c",
    "é\u202e😀",
    "\x00",
    "x" * 5000,
    "0x10",
    "1_000",
    "1,2",
    "!!python/name:os.system",
    "- a",
    "*",
    ":",
]

SENTENCES = [
    ("a good film", "yes"),
    ("a bad film", "no"),
    ("the plot was great", "yes"),
    ("the cast was awful", "no"),
] * 4


def jsonl(rows: list[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD_ROWS: list[object] = [{"text": text, "label": label} for text, label in SENTENCES]
GOOD = jsonl(GOOD_ROWS)
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in SENTENCES)
DATA: dict[str, bytes] = {
    "empty.jsonl": b"",
    "empty.csv": b"",
    "empty.parquet": b"",
    "empty.tsv": b"\n\n",
    "empty.json": b"{}",
    "list.json": b"[]",
    "numbers.json": b"[1, 2]",
    "null.json": b"null",
    "columns.json": b'{"text": ["a"], "label": [1, 2]}',
    "nested.json": b'{"data": {"rows": [{"text": "a", "label": 1}]}}',
    "deep.json": b"[" * 100_000,
    "cut.json": b'[{"text":',
    "cut.jsonl": GOOD[:-20],
    "array.jsonl": b"[1]\n[2]\n",
    "words.jsonl": b"hello\nworld\n",
    "nulls.jsonl": b"null\nnull\n",
    "bom.jsonl": b"\xef\xbb\xbf" + GOOD,
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "crlf.csv": CSV.replace("\n", "\r\n").encode(),
    "cr.csv": CSV.replace("\n", "\r").encode(),
    "utf16.csv": CSV.encode("utf-16"),
    "utf16.jsonl": GOOD.decode().encode("utf-16"),
    "latin1.csv": CSV.replace("film", "café").encode("latin-1"),
    "latin1.jsonl": b'{"text": "caf\xe9", "label": "yes"}\n' * 8,
    "nul.csv": CSV.replace("film", "fi\0lm").encode(),
    "nul.jsonl": GOOD.replace(b"film", b"fi\0lm"),
    "zeros.jsonl": bytes(4096),
    "random.csv": random.Random(0).randbytes(4096),
    "random.parquet": random.Random(1).randbytes(4096),
    "gzip.jsonl": b"\x1f\x8b\x08" + bytes(100),
    "zip.csv": b"PK\x03\x04" + bytes(100),
    "html.csv": b"<!DOCTYPE html><html><body>404</body></html>",
    "pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "header.csv": b"text,label\n",
    "one.csv": b"text,label\na good film,yes\n",
    "twice.csv": b"text,label,text\na,yes,b\nc,no,d\n" * 4,
    "unnamed.csv": b",,\na,yes,\n",
    "ragged.csv": CSV.encode() + b"a,b,c,d,e\n",
    "short.csv": CSV.encode() + b"alone\n",
    "quote.csv": CSV.encode() + b'"never closed,yes\n',
    "semicolon.csv": CSV.replace(",", ";").encode(),
    "tabs.csv": CSV.replace(",", "\t").encode(),
    "comma.tsv": CSV.encode(),
    "wrong.parquet": CSV.encode(),
    "wrong.jsonl": CSV.encode(),
    "wrong.csv": GOOD,
    "huge_line.jsonl": jsonl([{"text": "film " * 1_000_000, "label": "yes"}, {"text": "a", "label": "no"}] * 2),
    "wide.csv": (",".join(f"c{i}" for i in range(5000)) + "\n" + ",".join("x" for _ in range(5000)) + "\n").encode(),
    "many_labels.jsonl": jsonl([{"text": f"film {i}", "label": f"l{i}"} for i in range(300)]),
    "one_label.jsonl": jsonl([{"text": "film", "label": "yes"}] * 8),
    "nan_label.jsonl": b'{"text": "a", "label": NaN}\n{"text": "b", "label": 1}\n' * 4,
    "float_label.jsonl": jsonl([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}] * 4),
    "inf_label.jsonl": b'{"text": "a", "label": Infinity}\n' * 8,
    "bool_label.jsonl": jsonl([{"text": "a", "label": True}, {"text": "b", "label": False}] * 4),
    "mixed_label.jsonl": jsonl(
        [{"text": "a", "label": 1}, {"text": "b", "label": "1"}, {"text": "c", "label": None}] * 3
    ),
    "list_label.jsonl": jsonl([{"text": "a", "label": [1]}] * 8),
    "dict_text.jsonl": jsonl([{"text": {"a": 1}, "label": "yes"}] * 8),
    "list_text.jsonl": jsonl([{"text": ["a", "b"], "label": "yes"}, {"text": ["a"], "label": "no"}] * 4),
    "null_text.jsonl": jsonl([*GOOD_ROWS, {"text": None, "label": "yes"}]),
    "empty_text.jsonl": jsonl([*GOOD_ROWS, {"text": "", "label": "yes"}]),
    "no_label.jsonl": jsonl([*GOOD_ROWS, {"text": "a film"}]),
    "number_text.jsonl": jsonl([{"text": 1, "label": "yes"}, {"text": 2, "label": "no"}] * 4),
    "other_names.jsonl": jsonl([{"sentence": text, "stars": label} for text, label in SENTENCES]),
    "huge_number.jsonl": b'{"text": "a", "label": 1' + b"0" * 5000 + b"}\n",
    "twice_key.jsonl": b'{"text": "a", "text": "b", "label": "yes"}\n{"text": "a", "label": "no"}\n' * 4,
    "surrogate.jsonl": b'{"text": "\\ud800", "label": "yes"}\n{"text": "a", "label": "no"}\n' * 4,
    "unicode_names.jsonl": jsonl([{"te\u200bxt": text, "läbel\n": label} for text, label in SENTENCES]),
    "noextension": GOOD,
    "strange.xyz": GOOD,
    "a b'\"ü.jsonl": GOOD,
}

RECIPES: dict[str, bytes] = {
    "empty": b"",
    "list": b"- a\n- b\n",
    "text": b"hello",
    "number": b"3",
    "tabs": b"train:\n\tepochs: 1\n",
    "colon": b"train: epochs: 1\n",
    "twice": b"seed: 1\nseed: 2\n",
    "unknown": b"trian:\n  epochs: 1\n",
    "deep": b"{" * 5000,
    "binary": bytes(range(256)),
    "latin1": b"out: caf\xe9\n",
    "bom": b"\xef\xbb\xbfseed: 1\n",
    "crlf": b"seed: 1\r\nbudget: r1\r\n",
    "python": b"seed: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "tag": b"seed: !mine 3\n",
    "anchor": b"seed: &a 1\nbudget: *a\n",
    "no_anchor": b"seed: *nowhere\n",
    "merge": b"train:\n  <<: {epochs: 2}\n",
    "bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(8)),
    "self": b"defaults:\n  - self\n",
    "circle": b"# @package _global_\ndefaults:\n  - /recipe/circle\n  - _self_\n",
    "nowhere": b"# @package _global_\ndefaults:\n  - override /method: nowhere\n",
    "group": b"# @package _global_\ndefaults:\n  - override /nogroup: dora\n",
    "defaults_text": b"defaults: dora\n",
    "defaults_odd": b"defaults:\n  - 3\n  - null\n  - [a]\n",
    "package": b"# @package train\nepochs: 2\n",
    "env": b"# @package _global_\nout: ${oc.env:NOT_THERE_AT_ALL}\n",
    "resolver": b"# @package _global_\nseed: ${nowhere:3}\n",
    "missing": b"# @package _global_\nseed: ???\n",
    "interpolation": b"# @package _global_\nseed: ${seed}\n",
    "null_section": b"# @package _global_\ntrain: null\n",
    "list_section": b"# @package _global_\ntrain: [1]\n",
    "true_key": b"true: 1\n",
    "null_key": b"null: 1\n",
    "list_key": b"? [a, b]\n: 1\n",
    "date": b"# @package _global_\nseed: 2026-01-01\n",
    "norway": b"# @package _global_\nsave:\n  merged: no\n",
    "octal": b"# @package _global_\nseed: 0o17\n",
    "long": b"# @package _global_\nout: " + b"x" * 5000 + b"\n",
    "documents": b"seed: 1\n---\nseed: 2\n",
}

ARGUMENTS: list[list[str]] = [
    [],
    ["x"],
    ["=x"],
    ["recipe"],
    ["recipe="],
    ["recipe=nowhere"],
    ["recipe=/etc/passwd"],
    ["recipe=."],
    ["recipe=/dev/null"],
    ["--nope"],
    ["recipe=text_classification", "recipe=quickstart"],
    ["recipe=text_classification", "seed=1", "seed=2"],
    ["recipe=text_classification", "+new=1"],
    ["recipe=text_classification", "~seed"],
    ["recipe=text_classification", "method="],
    ["recipe=text_classification", "method=[dora,lora]"],
    ["recipe=text_classification", "hydra.run.dir=/tmp/x"],
    ["recipe=text_classification", "hydra/launcher=joblib"],
    ["--config-dir"],
    ["--config-dir", "/nowhere", "recipe=quickstart"],
    ["-m", "recipe=text_classification", "seed=1,banana"],
    ["-m"],
    ["recipe=text_classification", "train=3"],
    ["recipe=text_classification", "model=nowhere"],
]
MERGES = [
    [],
    ["checkpoint=nowhere", "out=x"],
    ["checkpoint=.", "out=x"],
    ["checkpoint=DATA", "out=x"],
    ["checkpoint=MODEL", "out=x"],
    ["checkpoint=/dev/null", "out=x"],
    ["checkpoint=MODEL", "out=x", "dtype=int3"],
    ["checkpoint=MODEL", "out=x", "shard_size=-1"],
    ["checkpoint=MODEL", "out=x", "shard_size=1e999GB"],
    ["checkpoint=MODEL"],
    ["out=x"],
    ["nope=1"],
]
EVALS = [
    [],
    ["checkpoint=nowhere"],
    ["checkpoint=a/b"],
    ["checkpoint="],
    ["checkpoint=MODEL"],
    ["checkpoint=DATA"],
    ["checkpoint=/dev/null", "recipe=quickstart"],
    ["checkpoint=MODEL", "recipe=text_classification", "data.path=DATA"],
    ["checkpoint=MODEL", "recipe=text_classification", "data.path=DATA", "split=nowhere"],
    ["checkpoint=MODEL", "recipe=nowhere"],
    ["checkpoint=MODEL", "train.learning_rate=1"],
    ["checkpoint=MODEL", "recipe=text_classification", "data.path=DATA", "out=/dev/null/x"],
]

Command = Callable[[list[str]], int]


@dataclass
class Case:
    kind: str
    what: str
    code: int
    seconds: float
    verdict: str
    said: str


def cases(folder: Path, overrides: int, seed: int) -> Iterator[tuple[str, str, Command, list[str]]]:
    """Kind, what it is, command, arguments."""
    model, data = folder / "model", folder / "data"
    names = {"MODEL": str(model), "DATA": str(data)}
    base = [
        "recipe=text_classification",
        f"model.name={model}",
        f"out={folder / 'run'}",
        "offline=true",
        "dry_run=true",
        "data.max_length=16",  # the tiny model's positions end at 32
    ]
    keys = sorted(known_keys(root_schema(load_parts())))
    draw = random.Random(seed)
    pairs = [(key, value) for key in keys for value in VALUES if key not in ("dry_run", "resume", "overwrite")]
    for key, value in draw.sample(pairs, min(overrides, len(pairs))):
        rest = [word for word in base if not word.startswith(f"{key}=")]
        rest += [f"data.path={data}"] if key != "data.path" else []
        method = draw.choice(["dora", "adalora", "lora", "sora", "elalora"])
        yield "override", f"{key}={value[:40]!r} ({method})", dora_train, [*rest, f"method={method}", f"{key}={value}"]
    for name, content in DATA.items():
        file = folder / "files" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        yield "data", name, dora_train, [*base, f"data.path={file}"]
    for name, content in RECIPES.items():
        file = folder / "recipes" / "recipe" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        more = [f"model.name={model}", f"data.path={data}", "dry_run=true", "offline=true", "data.max_length=16"]
        yield "recipe", name, dora_train, [f"recipe={file}", *more]
        yield (
            "recipe",
            f"{name} by name",
            dora_train,
            ["--config-dir", str(folder / "recipes"), f"recipe={name}", *more],
        )
    for kind, command, lists in (
        ("arguments", dora_train, ARGUMENTS),
        ("merge", dora_merge, MERGES),
        ("eval", dora_eval, EVALS),
    ):
        for arguments in lists:
            filled = arguments
            for short, full in names.items():
                filled = [word.replace(f"={short}", f"={full}") for word in filled]
            yield kind, " ".join(arguments), command, filled


def judge(code: int, said: str, seconds: float) -> str:
    if "Traceback" in said:
        return "WRONG: a traceback"
    if seconds > LONGEST:
        return "WRONG: it took too long"
    if code == 0:
        return "accepted"
    if code != 2:
        return f"WRONG: exit code {code}"
    message = said[said.rfind("error: ") :]
    if not message.startswith("error: "):
        return "WRONG: no message"
    lines = sum(-(-len(line) // 80) or 1 for line in message.strip().splitlines())
    return "refused" if lines <= SCREEN else f"WRONG: a message of {lines} lines"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overrides", type=int, default=250, help="key=value pairs drawn from all keys × odd values")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write every case here")
    options = parser.parse_args()
    tiny.before_forks()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        tiny.make(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        os.chdir(folder)
        log = folder / "said"
        for kind, what, command, arguments in cases(folder, options.overrides, options.seed):
            if kind not in options.kinds:
                continue
            log.unlink(missing_ok=True)
            begin = time.monotonic()
            code = live(arguments, log, None, command=command)
            seconds = time.monotonic() - begin
            said = log.read_text(encoding="utf-8", errors="replace")
            verdict = judge(code if code is not None else -9, said, seconds)
            found.append(Case(kind, what, code or 0, round(seconds, 2), verdict, said[said.rfind("error: ") :][:300]))
            if verdict.startswith("WRONG"):
                print(f"{verdict}: {kind} {what}: {' | '.join(said.strip().splitlines()[-3:])[-300:]}", flush=True)
    table = Counter((case.kind, case.verdict.split(":")[0]) for case in found)
    for (kind, verdict), n in sorted(table.items()):
        print(f"{kind:12}{verdict:12}{n:5}")
    print(f"{len(found)} cases in {sum(case.seconds for case in found):.0f} s")
    if options.json:
        options.json.write_text(json.dumps([asdict(case) for case in found], indent=1), encoding="utf-8")
    return int(any(case.verdict.startswith("WRONG") for case in found))


if __name__ == "__main__":
    sys.exit(main())
