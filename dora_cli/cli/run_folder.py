"""The run folder: where it is, whether it may be used, and what stands in it (DESIGN 4)."""

import shutil
from pathlib import Path
from typing import Any

from yaml import YAMLError

from dora_cli.config.differences import FREE_ON_RESUME, differences
from dora_cli.config.record import recipe_of
from dora_cli.errors import UserError
from dora_cli.reporting.trackers import FOLDERS, STATE

CONFIG, SUMMARY, METRICS, RANKS, LOG = "config.yaml", "summary.json", "metrics.jsonl", "ranks.json", "train.log"
ADAPTER, MERGED, CHECKPOINTS, REPORT = "adapter", "merged", "checkpoints", "report.html"
# Hidden files (the lock, leftovers of killed processes) count for nothing.
OURS = (CONFIG, SUMMARY, METRICS, RANKS, LOG, ADAPTER, MERGED, CHECKPOINTS, REPORT, STATE, *FOLDERS)
NOT_RESUMED = "resume=true: the configuration is not the interrupted run's"
REPEAT = "repeat the command of the interrupted run, or start anew in another out=DIR"


def default_out(recipe: str, method: str, budget: Any, seed: int) -> Path:
    """``runs/RECIPE/METHOD-bBUDGET-sSEED``; without a budget where it does not apply."""
    part = f"-b{str(budget).lower()}" if budget is not None else ""
    return Path("runs") / recipe / f"{method}{part}-s{seed}"


def is_finished(out: Path) -> bool:
    return (out / SUMMARY).exists()


def is_run(out: Path) -> bool:
    """Whether a run has begun there."""
    return (out / CONFIG).exists()


def check_ours(out: Path) -> None:
    """Refuse a place where a run can't be.

    Raises:
        UserError: it is a file, or a folder that holds something that is no run.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file", hint="choose another out=DIR")
    if out.exists() and not _is_run(out):
        raise UserError(f"out={out} holds files that are no run of dora-train's", hint="choose another out=DIR")


def check_free(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run's folder whose content would be lost.

    Raises:
        UserError: it holds a run and neither ``resume`` nor ``overwrite`` is set.
    """
    empty = not out.exists() or all(path.name.startswith(".") for path in out.iterdir())
    if empty or resume or overwrite:
        return
    if is_finished(out):
        raise UserError(
            f"out={out} holds a finished run",
            hint="choose another out=DIR, or overwrite=true to replace it",
        )
    raise UserError(
        f"out={out} holds an interrupted run",
        hint="resume=true goes on from its last checkpoint, overwrite=true starts anew",
    )


def _is_run(out: Path) -> bool:
    """Whether ``out`` holds what dora-train wrote: its config.yaml, or nothing but its files."""
    config = out / CONFIG
    if config.exists():
        return recipe_of(config.read_text(encoding="utf-8", errors="replace")) is not None
    return all(p.name in OURS or p.name.startswith(".") for p in out.iterdir())


def clear(out: Path) -> None:
    """Delete a run's files and evaluations of it, and nothing else that may stand beside them."""
    evaluations = [*out.glob("eval-*.json"), *out.glob("predictions-*.jsonl")]
    for path in (*(out / name for name in OURS), *evaluations):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_same(saved_yaml: str, yaml: str, where: Path, *, message: str = NOT_RESUMED, hint: str = REPEAT) -> None:
    """Refuse a run whose configuration would not go the same way; by default, to resume it.

    Raises:
        UserError: naming what differs, from what to what.
    """
    try:
        different = differences(saved_yaml, yaml, FREE_ON_RESUME)
    except YAMLError as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"{where} is damaged", where=cause, hint="start anew in another out=DIR") from None
    if different:
        shown = "; ".join(different[:6]) + (f"; and {len(different) - 6} more" if len(different) > 6 else "")
        raise UserError(message, where=f"{where}: {shown}", hint=hint)
