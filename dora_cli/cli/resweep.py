"""A sweep that was begun before: which of its jobs are finished, and which go on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dora_cli.cli import run_folder

if TYPE_CHECKING:
    from dora_cli.config.compose import Composed

# What a job does: nothing, as it is finished; goes on with what is there; only says its plan; begins.
Action = Literal["skip", "resume", "plan", "start"]


def action(out: Path, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Action:
    """What a job does, by what its folder holds. Where a run has begun there, that loads torch, to compose.

    Raises:
        UserError: a finished run is there, but another one: its configuration differs from the job's.
    """
    if not (run_folder.is_run(out) or run_folder.is_finished(out)):
        return "start"
    composed = configuration(overrides, config_dirs)
    if composed.config.dry_run:
        return "plan"
    if composed.config.overwrite:
        return "start"
    if not run_folder.is_finished(out):
        return "start" if "resume" in composed.origin else "resume"  # what is said of it holds
    path = out / run_folder.CONFIG
    saved = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    run_folder.check_same(
        saved,
        composed.yaml,
        path,
        message=f"{out} holds a finished run of another configuration",
        hint="choose another out=DIR for this sweep, or overwrite=true to replace what is there",
    )
    return "skip"


def configuration(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> "Composed":
    """A job's configuration."""
    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose

    return compose(overrides, load_parts(), config_dirs)
