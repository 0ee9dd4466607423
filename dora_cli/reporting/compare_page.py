"""A comparison's folder: ``index.html``, the same as CSV and Markdown, and its charts as pictures."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dora_cli.reporting.charts import write_png
from dora_cli.reporting.compare import Group, Setting, saved_of, shortened, value_of
from dora_cli.reporting.compare_charts import Looks, charts
from dora_cli.reporting.compare_tables import (
    LEGEND,
    as_csv,
    cautions,
    group_row,
    group_rows,
    mark,
    markdown,
    run_rows,
    says,
)
from dora_cli.reporting.page import write_page
from dora_cli.reporting.rank_map import arrange
from dora_cli.reporting.report import DEEP, depth
from dora_cli.reporting.runs import REPORT, Run

INDEX, RUNS_TABLE, GROUPS_TABLE, MARKDOWN = "index.html", "table.csv", "summary.csv", "table.md"
OURS = re.compile(r"index\.html|table\.csv|summary\.csv|table\.md|(\d+-)?(quality|curve-[\w.-]+)\.png")


def write_comparison(
    folder: Path,
    settings: Sequence[Setting],
    notes: Sequence[str],
    references: Sequence[Mapping[str, Group]],
    place: Path,
) -> None:
    """Fill ``folder``.

    Args:
        folder: an empty one.
        settings: what is compared.
        notes: what a reader must know of runs that were not counted.
        references: of each setting, label → the group that this one is compared with.
        place: where the folder is going to be, for links to the runs.
    """
    shown = []
    for number, (setting, of_setting) in enumerate(zip(settings, references, strict=True), start=1):
        drawn = charts(setting)
        prefix = f"{number}-" if len(settings) > 1 else ""
        for name, chart in drawn.items():
            write_png(chart, folder / f"{prefix}{name}.png")
        shown.append(_shown(setting, of_setting, place) | {"charts": {k: c.inline() for k, c in drawn.items()}})
    tables = {
        RUNS_TABLE: as_csv(run_rows(settings)),
        GROUPS_TABLE: as_csv(group_rows(settings, references)),
        MARKDOWN: markdown(settings, references),
    }
    for name, text in tables.items():
        (folder / name).write_text(text, encoding="utf-8")
    n_runs = sum(len(group.runs) for setting in settings for group in setting.groups)
    write_page(
        folder / INDEX,
        "compare.html",
        title=f"{n_runs} runs compared",
        settings=shown,
        notes=notes,
        legend=LEGEND,
        files=sorted(path.name for path in folder.iterdir()),
        deep=DEEP,
    )


def _shown(setting: Setting, references: Mapping[str, Group], place: Path) -> dict[str, Any]:
    looks = Looks(setting.groups)
    rows = [
        {
            "group": group,
            "key": _key(looks, group),
            "mark": mark(setting, group),
            "front": group in setting.front and len(setting.measured) > 1,
            "cells": group_row(setting, group, references.get(group.label)),
        }
        for group in setting.groups
    ]
    compared = dict.fromkeys(reference.label for reference in references.values())
    return {
        "says": says(setting),
        "cautions": list(cautions(setting)),
        "metric": setting.metric,
        "rows": rows,
        "reference": next(iter(compared)) if len(compared) == 1 else "the baseline at the same budget",
        "maps": _maps(setting, looks),
        "differing": _differing(setting),
        "runs": [(group.label, [_run(run, place) for run in group.runs]) for group in setting.groups],
    }


def _key(looks: Looks, group: Group) -> dict[str, Any]:
    """Colour and dashes of a group's line, for the sample beside its label."""
    return {"series": looks.series(group), "dashes": " ".join(f"{2 * length:g}" for length in looks.dashes(group))}


def _run(run: Run, place: Path) -> dict[str, Any]:
    page = run.folder / REPORT
    target = page if page.exists() else run.folder
    link = quote(os.path.relpath(target, place).replace(os.sep, "/"))
    return {"run": run, "link": link, "value": value_of(run), "step": (saved_of(run) or {}).get("step")}


def _differing(setting: Setting) -> list[tuple[str, list[str]]]:
    return [(key, [shortened(value) for value in values]) for key, values in setting.differing().items()]


def _maps(setting: Setting, looks: Looks) -> list[dict[str, Any]]:
    """A rank map a group, all in one scale of colours; those without any rank left out."""
    ranks = [(group, group.ranks) for group in setting.groups if group.finished]
    ranks = [(group, found) for group, found in ranks if any(found.values())]
    most = max((rank for _, found in ranks for rank in found.values()), default=1)
    return [
        {"label": group.label, "key": _key(looks, group), "n": len(group.finished), **_map(found, most)}
        for group, found in ranks
    ]


def _map(ranks: Mapping[str, float], most: float) -> dict[str, Any]:
    grid = arrange(list(ranks))
    whole = all(rank == int(rank) for rank in ranks.values())

    def cell(name: str | None) -> dict[str, Any] | None:
        if name is None:
            return None
        part = depth(ranks[name], most)
        look = "zero" if ranks[name] == 0 else "deep" if part > DEEP else ""
        return {"name": name, "rank": _rank(ranks[name], whole), "part": part, "look": look}

    rows = [
        (row, [cell(name) for name in names], _rank(sum(ranks[n] for n in names if n is not None), whole))
        for row, names in zip(grid.rows, grid.cells, strict=True)
    ]
    return {"columns": grid.columns, "rows": rows}


def _rank(rank: float, whole: bool) -> str:
    return f"{rank:.0f}" if whole or rank >= 99.5 else f"{rank:.1f}"
