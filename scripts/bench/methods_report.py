"""What methods.py found: means, paired differences with intervals, a table, a plot, and everything as JSON."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from dora_cli.checkpoints.atomic import atomic_write_text

LOWER_IS_BETTER = {"perplexity", "loss"}
Record = dict[str, Any]


def quality(record: Record) -> float:
    """The metric on the reported rows: in points of 100 where it lies in [−1, 1], as it is where it is a perplexity."""
    value = float(record["test"][record["metric"]])
    return value if record["metric"] in LOWER_IS_BETTER else 100 * value


def gain(record: Record, baseline: Record) -> float:
    """How much better a run is than the baseline's with the same task and seed; perplexities as percent less."""
    if record["metric"] in LOWER_IS_BETTER:
        return 100 * (1 - quality(record) / quality(baseline))
    return quality(record) - quality(baseline)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and the half width of its 95 % interval by Student's t; None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, float(half)


def compare(records: Sequence[Record], against: str) -> list[dict[str, Any]]:
    """One entry per (budget, task, label), and one per (budget, label) over all tasks whose metric is in points.

    The latter's interval is over the tasks' mean differences (n = tasks), with the one over all pairs beside it.
    """
    groups: dict[tuple[str, str, str], dict[int, Record]] = {}
    for r in records:
        groups.setdefault((r["budget"], r["task"], r["label"]), {})[r["seed"]] = r
    entries: list[dict[str, Any]] = []
    over_tasks: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (budget, task, label), runs in groups.items():
        baseline = groups.get((budget, task, against), {})
        gains = [gain(r, baseline[seed]) for seed, r in sorted(runs.items()) if seed in baseline]
        values = [quality(r) for r in runs.values()]
        entry = {
            "budget": budget,
            "task": task,
            "label": label,
            "metric": next(iter(runs.values()))["metric"],
            "rate": next(iter(runs.values()))["rate"],
            "seeds": sorted(runs),
            "params": statistics.fmean(r["params"] for r in runs.values()),
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "loss": statistics.fmean(r["test"]["loss"] for r in runs.values()),
            "seconds": statistics.fmean(r["seconds"] for r in runs.values()),
        }
        if label != against and gains:
            entry["gain"], entry["half_width"] = interval(gains)
            entry["gains"] = gains
            if entry["metric"] not in LOWER_IS_BETTER:
                over_tasks.setdefault((budget, label), {})[task] = gains
        entries.append(entry)
    for (budget, label), by_task in over_tasks.items():
        pairs = [g for gains in by_task.values() for g in gains]
        mean, half = interval([statistics.fmean(gains) for gains in by_task.values()])
        entries.append(
            {
                "budget": budget,
                "task": "all",
                "label": label,
                "tasks": sorted(by_task),
                "gain": mean,
                "half_width": half,
                "half_width_pairs": interval(pairs)[1],
                "pairs": len(pairs),
                "better": sum(g > 0 for g in pairs),
                "worse": sum(g < 0 for g in pairs),
            }
        )
    return entries


def table(entries: Sequence[dict[str, Any]], against: str) -> str:
    """Markdown."""
    lines = [
        f"| budget | task | method | rate | parameters | quality | sd | against {against} | n | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        if e["task"] == "all":
            continue
        sd = f"{e['sd']:.2f}" if e["sd"] is not None else "–"
        cells = [e["budget"], f"{e['task']} ({e['metric']})", e["label"], f"{e['rate']:g}", f"{e['params']:,.0f}"]
        n = len(e.get("gains", e["seeds"]))  # pairs, where there is something to pair with
        cells += [f"{e['mean']:.2f}", sd, signed(e.get("gain"), e.get("half_width")), str(n)]
        lines.append("| " + " | ".join([*cells, f"{e['loss']:.4f}"]) + " |")
    whole = [e for e in entries if e["task"] == "all"]
    if whole:
        lines += ["", f"Over tasks, points against {against}:", ""]
        lines += [
            "| budget | method | tasks | gain (interval over tasks) | (over pairs) | better / worse |",
            "|---|---|---|---|---|---|",
        ]
    for e in whole:
        pairs = "–" if e["half_width_pairs"] is None else f"± {e['half_width_pairs']:.2f}"
        score = f"{e['better']} / {e['worse']} of {e['pairs']}"
        cells = [e["budget"], e["label"], ", ".join(e["tasks"]), signed(e["gain"], e["half_width"]), pairs, score]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def signed(gain: float | None, half: float | None) -> str:
    if gain is None:
        return "–"
    return f"{gain:+.2f}" + (f" ± {half:.2f}" if half is not None else "")


def plot(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Quality against parameters, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [e for e in entries if e["task"] != "all"]
    tasks, labels = (list(dict.fromkeys(e[k] for e in entries)) for k in ("task", "label"))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.6), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for i, label in enumerate(labels):
            mine = sorted((e for e in entries if (e["task"], e["label"]) == (task, label)), key=lambda e: e["params"])
            if not mine:
                continue
            shift = 1 + 0.02 * (i - (len(labels) - 1) / 2)  # side by side where parameters are equal
            axis.errorbar(
                [e["params"] * shift for e in mine],
                [e["mean"] for e in mine],
                yerr=[e["sd"] or 0.0 for e in mine],
                marker="o",
                capsize=3,
                label=label,
                color=f"C{i}",
            )
        metric = next(e["metric"] for e in entries if e["task"] == task)
        axis.set(title=task, xlabel="adapter parameters", ylabel=metric, xscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)


def report(
    out: Path,
    about: Mapping[str, Any],
    tuned: Sequence[Record],
    rates: Mapping[tuple[str, str, str], float],
    reported: Sequence[Record],
    against: str,
) -> None:
    """Write OUT/results.json, OUT/table.md and OUT/quality.png, and print the table."""
    entries = compare(reported, against)
    chosen = [{"budget": b, "task": t, "label": l, "rate": rate} for (b, t, l), rate in rates.items()]  # noqa: E741
    content = {**about, "chosen": chosen, "summary": entries, "reported": list(reported), "tuned": list(tuned)}
    atomic_write_text(out / "results.json", json.dumps(content, indent=1) + "\n")
    if not entries:
        return
    text = table(entries, against)
    atomic_write_text(out / "table.md", text)
    plot(entries, out / "quality.png")
    print(text)
