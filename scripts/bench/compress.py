"""dora-compress at half the parameters: what is lost, beside training at that budget from the start.

    python scripts/bench/compress.py --runs OUT_OF_METHODS [--tasks sst2 …] [--from lora] [--budget 165888]
           [--share 0.5] [--split test] [--json FILE]

OUT_OF_METHODS is the --out of methods.py, in which method --from was trained at --budget, and at --share of it. Every
run at --budget is compressed to --share of its parameters (no data, no training) and measured on the same rows:

  whole       the run as it was trained
  compressed  the same, by dora-compress budget=SHARE
  trained     the run of the same task and seed that was trained at the smaller budget

Prints one line for each task with means over seeds and paired differences (95 % of Student's t), and writes all to
--json. `energy` is the share of Σσ² that compressing kept.
"""

import argparse
import contextlib
import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import yaml
from methods import TASKS
from methods_report import LOWER_IS_BETTER, interval, signed
from setting import machine, versions

from dora_cli.checkpoints.atomic import atomic_write_text
from dora_cli.cli.compress import main as compress
from dora_cli.cli.eval import main as evaluate


def quiet(command: Any, words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command(words)
    if code:
        raise SystemExit(f"error: {' '.join(words)} ended with {code}\n{said.getvalue()}")


def compressed(run: Path, task: str, share: float, split: str) -> dict[str, Any]:
    """Compress a run's adapter and measure it; kept beside the run, and not done again."""
    folder = run.with_name(f"{run.name}-compressed-{share:g}")
    told = folder / f"eval-{split}.json"
    if not told.exists():
        shutil.rmtree(folder, ignore_errors=True)
        quiet(compress, [f"checkpoint={run}", f"budget={share:g}", f"out={folder / 'adapter'}"])
        data = run.parents[5] / "data" / task  # of OUT/runs/STAGE/BUDGET/TASK/LABEL/RUN
        length = yaml.safe_load((run / "config.yaml").read_text())["data"]["max_length"]
        words = [f"checkpoint={folder / 'adapter'}", *TASKS[task].words, f"data.max_length={length}"]
        quiet(
            evaluate, [*words, f"data.path={data}", f"data.splits.{split}={split}", f"split={split}", f"out={folder}"]
        )
    kept = json.loads((folder / "adapter" / "compress.json").read_text())
    return {"metrics": json.loads(told.read_text())["metrics"], "energy": kept["after"]["energy"]}


def runs_of(out: Path, budget: str, task: str, label: str) -> dict[int, Path]:
    """Seed → folder of the finished runs that methods.py reported, all at one rate: the chosen one where it says so."""
    by_rate: dict[str, dict[int, Path]] = {}
    for file in (out / "runs" / "report" / budget / task / label).glob("lr*-s*/summary.json"):
        rate, _, seed = file.parent.name.removeprefix("lr").rpartition("-s")
        by_rate.setdefault(rate, {})[int(seed)] = file.parent
    if len(by_rate) > 1:
        results = out / "results.json"
        chosen = json.loads(results.read_text())["chosen"] if results.exists() else []
        mine = [c["rate"] for c in chosen if (c["budget"], c["task"], c["label"]) == (budget, task, label)]
        by_rate = {rate: runs for rate, runs in by_rate.items() if float(rate) in mine}
        if not by_rate:
            raise SystemExit(f"error: {budget}/{task}/{label} has several rates, and {results} chose none of them")
    return next(iter(by_rate.values()), {})


def measure(options: argparse.Namespace, task: str) -> dict[str, Any] | None:
    """Seed by seed the three of a task; None where nothing was trained at both budgets."""
    large = runs_of(options.runs, options.budget, task, options.label)
    small_budget = f"{int(options.budget) * options.share:.0f}"
    small = runs_of(options.runs, small_budget, task, options.label)
    rows = []
    for seed in sorted(large.keys() & small.keys()):
        whole, trained = (json.loads((run / "summary.json").read_text()) for run in (large[seed], small[seed]))
        metric = whole["last"]["name"]
        sign = -1 if metric in LOWER_IS_BETTER else 100
        cut = compressed(large[seed], task, options.share, options.split)
        values = [whole["metrics"][options.split], cut["metrics"], trained["metrics"][options.split]]
        quality = dict(zip(("whole", "compressed", "trained"), (sign * v[metric] for v in values), strict=True))
        losses = dict(zip(("whole", "compressed", "trained"), (v["loss"] for v in values), strict=True))
        rows.append({"seed": seed, "metric": metric, "energy": cut["energy"], "quality": quality, "loss": losses})
    return {"task": task, "rows": rows} if rows else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb", "qqp"])
    parser.add_argument("--from", dest="label", default="lora")
    parser.add_argument("--budget", default="165888", help="parameters of the runs that are compressed")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--split", default="test")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.runs = options.runs.resolve()
    found = [result for task in options.tasks if (result := measure(options, task))]
    for result in found:
        rows = result["rows"]
        means = {k: statistics.fmean(r["quality"][k] for r in rows) for k in ("whole", "compressed", "trained")}
        lost = interval([r["quality"]["compressed"] - r["quality"]["whole"] for r in rows])
        beside = interval([r["quality"]["compressed"] - r["quality"]["trained"] for r in rows])
        result |= {"means": means, "against_whole": lost, "against_trained": beside}
        energy = statistics.fmean(r["energy"] for r in rows)
        values = "  ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        print(f"{result['task']} n={len(rows)}  {values}  energy kept {energy:.3f}")
        print(f"  compressed against whole {signed(*lost)}, against trained {signed(*beside)}")
    if options.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        about = {"machine": machine(), "versions": versions("torch", "transformers"), "settings": settings}
        atomic_write_text(options.json, json.dumps(about | {"results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
