"""A comparison as tables: for the terminal, for a text file, and for whatever reads CSV."""

import csv
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from typing import Any

from dora_cli.reporting.compare import Group, Mean, Setting, mean_of, paired, params_of, saved_of, value_of
from dora_cli.reporting.runs import Run
from dora_cli.reporting.terminal import duration, number

WIDTH = 80
FEWEST = 3  # columns that stay, however long the labels are
Row = dict[str, Any]


def plus_minus(value: Mean | None, sign: bool = False) -> str:
    """``0.938 ± 0.013``: the mean as exact as its standard deviation in two digits; without one in four."""
    if value is None:
        return "–"
    plus = "+" if sign and value.mean > 0 else ""
    if not value.sd:
        return plus + number(value.mean) + ("" if value.sd is None else " ± 0")
    decimals = max(0, 1 - math.floor(math.log10(value.sd)))
    return f"{plus}{value.mean:,.{decimals}f} ± {value.sd:,.{decimals}f}"


def group_row(setting: Setting, group: Group, reference: Group | None) -> Row:
    """What is said of a group: heading → text, the same in the terminal, on the page and in Markdown."""
    difference = paired(group, reference) if reference is not None else None
    return {
        setting.metric: plus_minus(group.metric),
        "n": str(len(group.finished)) + (f" of {len(group.runs)}" if group.unfinished else ""),
        "parameters": _whole(group.params),
        "difference": plus_minus(difference, sign=True) if difference else "",
        "units": _whole(group.mean(lambda run: _budget(run)["components_end"])),
        "time": _duration(group),
        "peak MiB": _whole(group.mean(peak_memory)),
        "trained": _whole(group.mean(lambda run: _summary(run).get("trained_params_mean"))),
    }


def says(setting: Setting) -> str:
    """``accuracy on reviews, higher is better``."""
    return f"{setting.metric} on {setting.data}, {'higher' if setting.higher else 'lower'} is better"


def cautions(setting: Setting) -> Iterator[str]:
    """What must be said where means mislead: groups or the best of one run, seeds with rows of their own."""
    ns = [len(group.finished) for group in setting.measured]
    if len(ns) > 1 and max(ns) == 1:
        yield "each was run once: what another seed alone would change is not known; seed=1,2,3 would show it"
    elif len(setting.best.finished) == 1 and max(ns) > 1:
        yield f"the best, {setting.best.label}, was run once: how far its seeds lie apart is not known"
    finished = [run for group in setting.groups for run in group.finished]
    if len({run.seed for run in finished}) > 1 and any(_summary(run).get("held_out") for run in finished):
        yield "each seed held out other validation rows: runs of one seed, as in the differences, share theirs"


def mark(setting: Setting, group: Group) -> str:
    """``*`` the best mean, ``~`` those within one standard deviation of it."""
    return "*" if group is setting.best else "~" if setting.is_near(group) else ""


def text_table(setting: Setting, references: Mapping[str, Group]) -> list[str]:
    """Lines of at most 80 columns; for long labels the last columns are left out, and then labels are cut."""
    labels = ["", *(f"{mark(setting, group):1} {group.label}" for group in setting.groups)]
    rows = [group_row(setting, group, references.get(group.label)) for group in setting.groups]
    heads = [setting.metric, "n", "parameters", "difference", "time", "peak MiB"]
    columns = [[head, *(row[head] for row in rows)] for head in heads]
    widths = [max(map(len, column)) for column in columns]
    longest = max(map(len, labels))
    while len(widths) > FEWEST and longest + sum(widths) + 2 * len(widths) > WIDTH:
        widths.pop()
    room = min(longest, WIDTH - sum(widths) - 2 * len(widths))
    lines = wrapped(says(setting))
    for label, *cells in zip(labels, *columns[: len(widths)], strict=True):
        label = label if len(label) <= room else label[: room - 1] + "…"
        right = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([f"{label:<{room}}", *right]).rstrip())
    return lines


def wrapped(text: str) -> list[str]:
    """Lines of at most 80 columns, but for longer words: a path stays whole."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def markdown(settings: Sequence[Setting], references: Sequence[Mapping[str, Group]]) -> str:
    """``table.md``: a table a setting."""
    lines: list[str] = []
    for setting, of_setting in zip(settings, references, strict=True):
        rows = [(g, group_row(setting, g, of_setting.get(g.label))) for g in setting.groups]
        heads = list(rows[0][1])
        lines += [f"### {says(setting)}", "", _line(["", *heads])]
        lines.append("| --- |" + " ---: |" * len(heads))
        for group, row in rows:
            label = f"**{group.label}**" if setting.is_near(group) else group.label
            lines.append(_line([label, *row.values()]))
        lines.append("")
    return "\n".join([*lines, LEGEND, ""])


def _line(cells: Sequence[str]) -> str:
    """A row of a Markdown table; a | of the text's own would end its cell."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


LEGEND = (
    "Means over n seeds ± the standard deviation of one run (n − 1). Bold: the best mean, and those within one "
    "standard deviation of it. Difference: of runs with the same seed."
)


def run_rows(settings: Sequence[Setting]) -> Iterator[Row]:
    """``table.csv``: a row a run."""
    for setting in settings:
        for group in setting.groups:
            own = {key: group.config.get(key) for key in setting.differing() if key not in ("method", "budget")}
            for run in group.runs:
                yield _run_row(setting, group, run) | own


def _run_row(setting: Setting, group: Group, run: Run) -> Row:
    summary, saved = run.summary or {}, saved_of(run) or {}
    budget, train = summary.get("budget", {}), summary.get("train", {})
    sizes = ("params_start", "params_end", "components_start", "components_end")
    cost = ("steps", "seconds", "samples_per_second", "peak_rss_mib", "peak_device_mib")
    return {
        "run": str(run.folder),
        "data": setting.data,
        "group": group.label,
        "recipe": run.recipe,
        "method": run.method,
        "budget": run.budget,
        "seed": run.seed,
        "finished": bool(summary),
        "metric": setting.metric,
        "value": value_of(run),
        "at_step": saved.get("step"),
        **{key: budget.get(key) for key in sizes},
        **{key: summary.get(key) for key in ("head_params", "trained_params", "trained_params_mean")},
        **{key: train.get(key) for key in cost},
    }


def group_rows(settings: Sequence[Setting], references: Sequence[Mapping[str, Group]]) -> Iterator[Row]:
    """``summary.csv``: a row a group, every mean with its standard deviation."""
    for setting, of_setting in zip(settings, references, strict=True):
        for group in setting.groups:
            reference = of_setting.get(group.label)
            difference = paired(group, reference) if reference is not None else None
            yield {
                **{"data": setting.data, "group": group.label, "method": group.method, "budget": group.budget},
                **{"n": len(group.finished), "unfinished": len(group.unfinished)},
                "seeds": " ".join(str(run.seed) for run in group.finished),
                "metric": setting.metric,
                **_both("value", group.metric),
                **_both("params_end", group.mean(params_of)),
                **_both("components_end", group.mean(lambda run: _budget(run)["components_end"])),
                **_both("trained_params_mean", group.mean(lambda run: _summary(run).get("trained_params_mean"))),
                **_both("seconds", group.mean(lambda run: _summary(run)["train"]["seconds"])),
                **_both("peak_mib", group.mean(peak_memory)),
                **{"best": group is setting.best, "near_best": setting.is_near(group), "front": group in setting.front},
                "compared_with": reference.label if reference is not None and reference is not group else None,
                "shared_seeds": difference.n if difference else None,
                **_both("difference", difference),
            }


def as_csv(rows: Iterator[Row]) -> str:
    """Columns are those of all rows, in the order in which they first come."""
    table = list(rows)
    file = StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()


def peak_memory(run: Run) -> float | None:
    """MiB on the device where there is one, else of the process."""
    train = _summary(run)["train"]
    on_device = train.get("peak_device_mib")
    return on_device if on_device is not None else train.get("peak_rss_mib")


def _both(name: str, value: Mean | None) -> Row:
    return {name: value.mean if value else None, f"{name}_sd": value.sd if value else None}


def _duration(group: Group) -> str:
    seconds = mean_of([_summary(run)["train"]["seconds"] for run in group.finished])
    return duration(seconds.mean) if seconds else "–"


def _whole(value: Mean | None) -> str:
    return "–" if value is None else f"{value.mean:,.0f}"


def _summary(run: Run) -> Mapping[str, Any]:
    assert run.summary is not None
    return run.summary


def _budget(run: Run) -> Mapping[str, Any]:
    budget: Mapping[str, Any] = _summary(run)["budget"]
    return budget
