"""What a run says at its beginning and at its end, on the terminal and in ``train.log``."""

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import RenderableType

from dora_cli.cli import run_folder
from dora_cli.reporting.events import jsonable
from dora_cli.reporting.plan_view import plan_view
from dora_cli.reporting.terminal import plain, room, show, summary_view, to_whoever_looks
from dora_cli.training.plan import Plan


def print_plan(plan: Plan, dry_run: bool | str = False) -> None:
    """To stdout: with its modules for a dry run, as one JSON object for ``dry_run=json``."""
    if dry_run == "json":
        with to_whoever_looks():
            print(json.dumps(jsonable(plan.facts), indent=2), flush=True)
        return
    width, unicode = room()
    show(plan_view(plan.sections, plan.facts, with_modules=bool(dry_run), unicode=unicode, width=width))


def plan_text(plan: Plan) -> str:
    """The plan for the log."""
    return plain(plan_view(plan.sections, plan.facts, with_modules=True))


def logged_end(out: Path, summary: Mapping[str, Any], files: Mapping[str, Path]) -> RenderableType:
    """What came out, and what to do with it, to be shown; it is added to the log here."""
    view = summary_view(summary, files, next_steps(out))
    with (out / run_folder.LOG).open("a", encoding="utf-8") as log:
        print(plain(view), file=log)
    return view


def next_steps(out: Path) -> list[str]:
    """What can be done with a finished run, as commands."""
    run = quote(str(out))
    report = out / run_folder.REPORT
    steps = [f"open {quote(str(report))}"] if report.exists() else []
    if not (out / run_folder.MERGED).exists():
        steps.append(f"dora-merge checkpoint={run} out={quote(str(out / run_folder.MERGED))}")
    return [*steps, f"dora-eval checkpoint={run} data.path=FILE"]
