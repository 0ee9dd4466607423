"""``report.html``: one run on one page, for people who look rather than read JSON."""

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_cli.reporting.charts import INK, MUTED, SERIES, Chart, log_scale, plain_numbers, shade_window
from dora_cli.reporting.page import write_page
from dora_cli.reporting.rank_map import arrange
from dora_cli.reporting.runs import PARTS, Record, Run
from dora_cli.reporting.terminal import duration, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEEP = 70  # percent of the colour from which on figures are white
MOST_FRAMES = 120  # of the rank map's slider
WINDOW = "units are chosen"


def write_report(run: Run, path: Path) -> None:
    """Write the page of ``run`` to ``path``."""
    write_page(
        path,
        "report.html",
        title=run.title,
        run=run,
        tiles=list(_tiles(run)),
        last_event="the last event so far" if run.summary is None else "the final choice",
        charts=[chart.inline() for chart in charts(run)],
        importance=chart.inline() if (chart := importance_chart(run)) else None,
        standing=_standing(run),
        shrinks=run.summary is not None
        and run.summary["budget"]["components_end"] < run.summary["budget"]["components_start"],
        map=_rank_map(run),
        facts=list(_facts(run)),
        command=f"dora-train recipe={shlex.quote(str(run.folder / 'config.yaml'))} out=NEW",
    )


# ---- what stands in numbers ----------------------------------------------------------------------------------------
def _tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    """(what, value, more) of the few numbers that say how the run went."""
    summary, name = run.summary, run.main_metric
    if summary is None:
        yield "state", "unfinished", f"{run.steps:,} steps so far"
    if summary is not None and summary["best"]:
        best = summary["best"]
        yield f"{best['name']}, best", number(best["value"]), f"at step {best['step']:,}"
    elif name is not None:
        values = run.curve(run.splits[0], name)[1]
        yield f"{name}, latest", number(values[-1]) if values else "?", ""
    if summary is None:
        return
    budget, train = summary["budget"], summary["train"]
    if budget["params_end"]:
        yield "adapter parameters", f"{budget['params_end']:,}", f"of {budget['params_start']:,} at the start"
        unit = summary.get("unit", "units")
        yield unit, f"{budget['components_end']:,}", f"of {budget['components_start']:,} at the start"
    yield "training", duration(train["seconds"]), f"{train['samples_per_second']:,.0f} rows a second"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Key and value of all else that a reader may want to look up."""
    summary = run.summary
    for group in ("model", "data", "method"):
        if group in run.choices:
            yield group, _choice(run, group)
    yield "parts", ", ".join(f"{group} {run.choices[group]}" for group in _parts(run))
    yield "budget asked for", run.budget or "none"
    if summary is None:
        return
    train = summary["train"]
    yield (
        "parameters trained",
        f"{summary['trained_params']:,} at the end, of which {summary['head_params']:,} in heads",
    )
    yield "trained on average", f"{summary['trained_params_mean']:,} parameters a step"
    yield "steps", f"{train['steps']:,}, {train['samples']:,} rows, {train['tokens']:,} tokens"
    if train["skipped"]:
        yield "skipped", f"{train['skipped']:,} steps whose loss or gradient was not finite"
    yield "speed", f"{train['samples_per_second']:,.1f} rows/s, {train['tokens_per_second']:,.0f} tokens/s"
    yield (
        "peak memory",
        f"{train['peak_rss_mib']:,} MiB"
        + (f", {train['peak_device_mib']:,} MiB on the device" if train["peak_device_mib"] is not None else ""),
    )
    if train.get("processes", 1) > 1:
        yield "processes", str(train["processes"])
    adapter = run.folder / "adapter" / "adapter_model.safetensors"
    if adapter.exists():
        yield "saved adapter", f"{adapter.stat().st_size / 1e6:,.2f} MB, heads included"
    yield "versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())


def _choice(run: Run, group: str) -> str:
    """``minilm (package://…)``: the choice, and the name or path that came of it."""
    if group == "method":
        return run.method
    section = run.config.get(group) or {}
    name = section.get("name") or section.get("path")
    return run.choices[group] + (f" ({name})" if name and name != run.choices[group] else "")


def _parts(run: Run) -> list[str]:
    return [group for group in PARTS if group in run.choices]


def _standing(run: Run) -> dict[str, Any] | None:
    """What an event took last, and what the last one nearly took; None where none ever takes anything."""
    taking = [event for event in run.events if event.get("standing", {}).get("lost")]
    last = next((event for event in reversed(run.events) if "standing" in event), None)
    return {"last": last, "taking": taking[-1]} if taking else None


def _rank_map(run: Run) -> dict[str, Any] | None:
    """The grid of target modules, and the frames of its slider: the events, thinned, and the end."""
    if not run.ranks:
        return None
    grid, events = arrange(list(run.ranks)), run.events
    if len(events) > MOST_FRAMES:
        events = [events[round(i * (len(events) - 1) / (MOST_FRAMES - 1))] for i in range(MOST_FRAMES)]
    frames = [
        _frame(f"step {e['step']:,}: {e['alive']:,} alive, {e['params']:,} parameters", e["ranks"], run) for e in events
    ]
    if run.summary is not None or not frames:
        frames.append(_frame(f"at the end: {sum(run.ranks.values()):,} alive", run.ranks, run))
    most = max(1, *(max(frame["ranks"]) for frame in frames))
    for frame in frames:
        frame["parts"] = [depth(rank, most) for rank in frame["ranks"]]
    index = {name: i for i, name in enumerate(run.ranks)}

    def cell(name: str | None) -> dict[str, Any] | None:
        if name is None:
            return None
        rank, part = run.ranks[name], depth(run.ranks[name], most)
        look = "zero" if rank == 0 else "deep" if part > DEEP else ""
        return {"index": index[name], "name": name, "rank": rank, "part": part, "look": look}

    rows = [
        (row, [cell(name) for name in names], sum(run.ranks[name] for name in names if name is not None))
        for row, names in zip(grid.rows, grid.cells, strict=True)
    ]
    return {"columns": grid.columns, "rows": rows, "frames": frames, "shown": frames[-1], "deep": DEEP}


def _frame(label: str, ranks: Mapping[str, int], run: Run) -> dict[str, Any]:
    return {"label": label, "ranks": [ranks.get(name, 0) for name in run.ranks]}


def depth(rank: float, most: float) -> int:
    """How deep a rank's colour is, in percent: by its root, so that ranks 1 and 2 beside a 16 are still told apart."""
    return round(100 * math.sqrt(rank / most))


# ---- what is drawn -------------------------------------------------------------------------------------------------
def charts(run: Run) -> list[Chart]:
    """Loss, main metric and budget over the steps, as far as there is something to draw."""
    found = [Chart("Loss", f"loss over {run.steps} steps", lambda axes, narrow: _draw_loss(axes, run))]
    name = run.main_metric
    if name is not None and name != "loss" and run.splits:
        found.append(
            Chart(f"{name} of each evaluation", f"{name} over the steps", lambda axes, narrow: _draw_metric(axes, run))
        )
    if run.events:
        found.append(
            Chart("Budget and what lives", "units alive over the steps", lambda axes, narrow: _draw_budget(axes, run))
        )
    return found if run.records else []


def importance_chart(run: Run) -> Chart | None:
    """How the scores were spread at each event, and where the line fell."""
    events = [event for event in run.events if event.get("standing", {}).get("quantiles")]
    if not events:
        return None
    return Chart(
        "Scores of all units that were ranked, at each event",
        "spread of the importance scores at each allocation event",
        lambda axes, narrow: _draw_importance(axes, events, line=_standing(run) is not None),
    )


def _steps_axis(axes: "Axes", run: Run) -> None:
    """The run's steps from left to right, those shaded in which units are chosen."""
    axes.set_xlim(0, 1.02 * max(run.steps, 1))  # a point at the last step stays whole
    plain_numbers(axes, "x")
    axes.set_xlabel("optimizer step")
    shade_window(axes, run.window, WINDOW, closed=run.summary is not None)


def _draw_loss(axes: "Axes", run: Run) -> None:
    _steps_axis(axes, run)
    axes.plot(*run.curve("train", "loss"), color=SERIES[0], linewidth=1.5, label="train")
    for colour, split in zip(SERIES[1:], run.splits, strict=False):
        steps, values = run.curve(split, "loss")
        axes.plot(steps, values, color=colour, marker="o", markersize=4, label=split)
    axes.legend(loc="best")


def _draw_metric(axes: "Axes", run: Run) -> None:
    name = run.main_metric
    assert name is not None
    _steps_axis(axes, run)
    for colour, split in zip(SERIES[1:], run.splits, strict=False):
        steps, values = run.curve(split, name)
        axes.plot(steps, values, color=colour, marker="o", markersize=4, label=split)
    best = run.summary["best"] if run.summary is not None else None
    if best:
        axes.plot([best["step"]], [best["value"]], "o", markersize=11, fillstyle="none", color=INK, label="best")
    axes.legend(loc="best")


def _draw_budget(axes: "Axes", run: Run) -> None:
    _steps_axis(axes, run)
    last = max(run.steps, run.events[-1]["step"])
    by_cost = run.events[-1].get("budget_unit") == "parameters"
    steps = [event["step"] for event in run.events]
    alive = [event["params" if by_cost else "alive"] for event in run.events]
    asked = [event["budget"] for event in run.events]
    dashed = "alive or on trial" if "auto" in run.events[-1] else "budget asked for"
    if run.summary is not None:
        steps.insert(0, 0)
        for values in (alive, asked):
            values.insert(0, run.summary["budget"]["params_start" if by_cost else "components_start"])
    axes.step([*steps, last], [*asked, asked[-1]], where="post", color=MUTED, linestyle="--", label=dashed)
    label = "alive" if run.events[-1].get("budget_unit") in ("components", "parameters") else "in training"
    axes.step([*steps, last], [*alive, alive[-1]], where="post", color=SERIES[0], label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(run.events[-1].get("budget_unit", "units"))
    plain_numbers(axes)
    axes.legend(loc="best")


def _draw_importance(axes: "Axes", events: list[Record], *, line: bool) -> None:
    steps = [event["step"] for event in events]
    quantiles = [event["standing"]["quantiles"] for event in events]
    n = len(quantiles[0])
    marker = "o" if len(events) == 1 else None

    def at(share: float) -> list[float]:
        return [values[round(share * (n - 1))] for values in quantiles]

    for low, high, strength in ((0.0, 1.0, 0.15), (0.1, 0.9, 0.2), (0.25, 0.75, 0.3)):
        label = {0.0: "all", 0.1: "middle 80 %", 0.25: "middle 50 %"}[low]
        axes.fill_between(steps, at(low), at(high), color=SERIES[0], alpha=strength, linewidth=0, label=label)
    axes.plot(steps, at(0.5), color=SERIES[0], marker=marker, label="median")
    kept = [(event["step"], k) for event in events if (k := event["standing"]["lowest_kept"]) is not None]
    if line and kept:
        axes.plot(*zip(*kept, strict=True), color=SERIES[1], marker=marker, label="lowest that lives")
    if min(at(0.1)) > 0:  # a few zeros fall off the lower edge
        log_scale(axes)
    plain_numbers(axes, "x")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("score")
    axes.legend(loc="best", ncols=2)
