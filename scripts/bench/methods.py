"""Methods × tasks × seeds at one final budget of adapter parameters: who is better, and by how much.

    python scripts/bench/methods.py --data FOLDER --out FOLDER [--tasks cola sst2 stsb qqp] [--rows 3000]
           [--methods lora adalora dora dora_plus] [--variant "label: method=dora adapter.init=eva" …]
           [--budgets 82944] [--epochs 3] [--rates 5e-4 1e-3 2e-3 4e-3 8e-3] [--tune-seeds 101] [--seeds 1 2 3]
           [--rate dora=2.5e-3 …] [--workers 2] [--against lora]
           [--override model=minilm "questions: model.name=FOLDER" …]

FOLDER of --data holds glue/TASK/{train,validation}.jsonl and gsm8k/{train,test}.jsonl. Of each task:

  train        --rows rows of its training file, drawn with a fixed seed
  validation   --dev other rows of its training file: the learning rate is chosen on them, and on nothing else
  test         its validation file, or --test rows of it: reported, and never chosen on

Every method tries every rate of the grid with the tuning seeds; the rate with the best mean on `validation` is trained
again with --seeds, and the weights after the last step are measured on `test` (no checkpoint is chosen). A label that
--rate names has that rate and chooses none, as published ones are tried. A seed draws the same head, the same batches
in the same order for all methods, so that differences are paired. Runs are those of `dora-train`, in --workers
processes of one thread each (or on a GPU, which they share). A run that is finished is not done again: the same command
goes on where it was interrupted. A run is known by its stage, budget, task, label, rate and seed; with other words or
--epochs a command refuses to take it for its own (--rows it does not see): take another label or --out. Another
command with the same --out adds its runs, and writes the three files below anew, of what it asked for itself.

Writes OUT/results.json (settings, machine, chosen rates, every run), OUT/table.md and OUT/quality.png. Intervals are
95 % of Student's t over the paired differences; over tasks, of the tasks' mean differences, with the one over all
(task, seed) pairs beside it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from methods_report import LOWER_IS_BETTER, report
from setting import machine, versions

from dora_cli.checkpoints.atomic import atomic_write_text

TUNE, REPORT = "tune", "report"


@dataclass(frozen=True)
class Task:
    """Where a task's rows are, below --data, and what dora-train is told of it."""

    train: str
    held_out: str
    words: tuple[str, ...]


def _glue(name: str) -> Task:
    return Task(f"glue/{name}/train.jsonl", f"glue/{name}/validation.jsonl", (f"recipe=glue_{name}",))


TASKS = {name: _glue(name) for name in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")} | {
    # A language model that goes on reading: every token of GSM8K's questions counts, and the metric is perplexity.
    "questions": Task("gsm8k/train.jsonl", "gsm8k/test.jsonl", ("recipe=clm_text", "data.columns.text=question")),
}


@dataclass(frozen=True)
class Job:
    """One run of ``dora-train``."""

    stage: str
    budget: str
    task: str
    label: str
    rate: float
    seed: int
    words: tuple[str, ...]  # what the variant says, method=NAME first

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.stage / self.budget / self.task / self.label / f"lr{self.rate:g}-s{self.seed}"

    def argv(self, options: argparse.Namespace) -> list[str]:
        data = options.out / "data" / self.task
        extra = ["data.splits.test=test"] if self.stage == REPORT else []
        return [
            *TASKS[self.task].words,
            f"data.path={data}",
            *extra,
            *([] if "schedule=auto" in self.words else [f"budget={self.budget}"]),
            "adapter.rank=null",
            "offline=true",
            f"train.device={options.device}",
            f"train.epochs={options.epochs:g}",
            f"train.batch_size={options.batch}",
            "train.eval_every=1000000",  # the last step alone
            "train.save_every=1000000",
            "save.which=last",
            "save.report=false",
            *overrides(self.task, options),
            *self.words,
            f"train.learning_rate={self.rate:g}",
            f"seed={self.seed}",
            f"out={self.folder(options.out)}",
            "overwrite=true",
        ]


def overrides(task: str, options: argparse.Namespace) -> list[str]:
    """Words of every run of a task: those without a prefix where its recipe is GLUE's, and those with its name."""
    own = [text.partition(":")[2].split() for text in options.override if text.startswith(f"{task}:")]
    shared = [text for text in options.override if text.partition(":")[0] not in TASKS]
    return [*(shared if not own else []), *(word for words in own for word in words)]


def variants(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Label → words."""
    found = {name: (f"method={name}",) for name in options.methods}
    for text in options.variant:
        label, colon, words = text.partition(":")
        if not colon or not any(word.startswith("method=") for word in words.split()):
            raise SystemExit(f"error: --variant {text!r} is not 'label: method=NAME key=value …'")
        found[label.strip()] = tuple(words.split())
    return found


def given_rates(options: argparse.Namespace, labels: Collection[str]) -> dict[str, float]:
    """Label → the rate that is taken instead of chosen."""
    given = {}
    for text in options.rate:
        label, _, rate = text.partition("=")
        if label not in labels:
            raise SystemExit(f"error: --rate {text!r} names none of {', '.join(labels)}")
        given[label] = float(rate)
    return given


def prepare(options: argparse.Namespace) -> None:
    """Write each task's train, validation and test rows; the same for every later command."""
    for task in options.tasks:
        folder = options.out / "data" / task
        if (folder / "test.jsonl").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rows = (options.data / TASKS[task].train).read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(rows)
        test = (options.data / TASKS[task].held_out).read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(test)
        cut = min(options.rows, len(rows) - options.dev)
        parts = {"train": rows[:cut], "validation": rows[cut : cut + options.dev], "test": test[: options.test]}
        for role, lines in parts.items():
            atomic_write_text(folder / f"{role}.jsonl", "".join(line + "\n" for line in lines))


def read(job: Job, out: Path) -> dict[str, Any] | None:
    """What came out of a finished run; None of one that isn't."""
    file = job.folder(out) / "summary.json"
    if not file.exists():
        return None
    summary = json.loads(file.read_text())
    metric = summary["last"]["name"]
    return {
        **{k: v for k, v in asdict(job).items() if k != "words"},
        "metric": metric,
        "params": summary["budget"]["params_end"],
        "params_start": summary["budget"]["params_start"],
        "validation": summary["metrics"]["validation"],
        "test": summary["metrics"].get("test"),
        "seconds": summary["train"]["seconds"],
    }


def work(task: tuple[Job, list[str], str]) -> tuple[Job, str]:
    """Do one job in this process; what it prints goes to a log beside its folder. Returns what went wrong, if any."""
    job, argv, log = task
    from dora_cli.cli.train import train

    Path(log).parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(Path(log).with_suffix(".words.json"), json.dumps(argv, indent=1) + "\n")
    with open(log, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        try:
            return job, "" if train(argv) == 0 else "interrupted"
        except Exception:
            traceback.print_exc()
            return job, traceback.format_exc(limit=1).splitlines()[-1]


def finished(job: Job, options: argparse.Namespace) -> bool:
    """Whether the job has come to its end. One that was told other words is no answer to this command: it ends it."""
    if read(job, options.out) is None:
        return False
    told = Path(f"{job.folder(options.out)}.words.json")
    if told.exists() and json.loads(told.read_text()) != job.argv(options):
        raise SystemExit(f"error: a run of other words is there ({told}): take another --out, or another label")
    return True


def do(jobs: list[Job], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what isn't finished; the records of all."""
    todo = [job for job in jobs if not finished(job, options)]
    tasks = [(job, job.argv(options), f"{job.folder(options.out)}.log") for job in todo]
    since = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for i, (job, error) in enumerate(pool.imap_unordered(work, tasks), 1):
            seconds = time.perf_counter() - since
            record = read(job, options.out)
            result = error or "no summary"
            if record:
                split = record["test"] or record["validation"]
                result = f"{record['metric']} {split[record['metric']]:.4f}  loss {split['loss']:.4f}"
            name = f"{job.stage} {job.budget} {job.task} {job.label} lr {job.rate:g} seed {job.seed}"
            print(f"{seconds:6.0f} s  {i}/{len(todo)}  {name}: {result}", flush=True)
    records = [read(job, options.out) for job in jobs]
    return [record for record in records if record]


def best_rates(records: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """(budget, task, label) → the rate with the best mean on validation; of equal ones the lowest loss.

    A rate at which a seed did not come to its end is out: its mean would be that of the seeds that survived.
    """
    means: dict[tuple[str, str, str], dict[float, list[tuple[float, float]]]] = {}
    for r in records:
        held, sign = r["validation"], -1 if r["metric"] in LOWER_IS_BETTER else 1
        rates = means.setdefault((r["budget"], r["task"], r["label"]), {})
        rates.setdefault(r["rate"], []).append((sign * held[r["metric"]], -held["loss"]))
    best = {}
    for key, rates in means.items():
        most = max(map(len, rates.values()))
        whole = {
            rate: tuple(sum(column) / most for column in zip(*runs, strict=True))
            for rate, runs in rates.items()
            if len(runs) == most
        }
        best[key] = max(whole, key=lambda rate: whole[rate])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["cola", "sst2", "stsb", "qqp"])
    parser.add_argument("--methods", nargs="*", default=["lora", "adalora", "dora", "dora_plus"])
    parser.add_argument("--variant", action="append", default=[], help="'label: method=NAME key=value …'")
    parser.add_argument("--override", nargs="+", default=["model=minilm"], help="words of every run")
    parser.add_argument("--budgets", nargs="+", default=["82944"], help="final budgets, as dora-train takes them")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=3000, help="training rows")
    parser.add_argument("--dev", type=int, default=1000, help="rows that rates are chosen on")
    parser.add_argument("--test", type=int, default=1500, help="rows that are reported, at most")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--rate", nargs="+", default=[], help="LABEL=RATE: taken instead of chosen")
    parser.add_argument("--tune-seeds", nargs="+", type=int, default=[101])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--against", default="lora", help="the label that differences are taken to")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if set(options.tune_seeds) & set(options.seeds):
        raise SystemExit("error: a seed that chose rates can't be reported")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare(options)
    labels = variants(options)
    given = given_rates(options, labels)
    tuned = do(
        [
            Job(TUNE, budget, task, label, rate, seed, words)
            for budget in options.budgets
            for task in options.tasks
            for seed in options.tune_seeds
            for rate in options.rates
            for label, words in labels.items()
            if label not in given
        ],
        options,
    )
    rates = best_rates(tuned)
    rates |= {(b, task, label): given[label] for b in options.budgets for task in options.tasks for label in given}
    reported = do(
        [
            Job(REPORT, budget, task, label, rates[budget, task, label], seed, words)
            for seed in options.seeds
            for budget in options.budgets
            for task in options.tasks
            for label, words in labels.items()
            if (budget, task, label) in rates
        ],
        options,
    )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    packages = versions("torch", "transformers")
    about = {"command": sys.argv, "settings": settings, "machine": machine(), "versions": packages}
    report(options.out, about, tuned, rates, reported, options.against)


if __name__ == "__main__":
    main()
