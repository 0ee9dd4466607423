"""A sweep that was begun before: which of its jobs are finished, and which go on."""

from collections.abc import Sequence
from pathlib import Path

from dora_cli.cli import run_folder


def is_finished(out: Path, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> bool:
    """Whether a job's folder holds its finished run. Where it does, that loads torch, to compose the configuration.

    Raises:
        UserError: the run there is another one: its configuration differs from the job's.
    """
    if not run_folder.is_finished(out) or _starts_anyway(overrides):
        return False
    path = out / run_folder.CONFIG
    saved = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    run_folder.check_same(
        saved,
        configuration(overrides, config_dirs),
        path,
        message=f"{out} holds a finished run of another configuration",
        hint="choose another out=DIR for this sweep, or overwrite=true to replace what is there",
    )
    return True


def is_interrupted(out: Path, overrides: Sequence[str]) -> bool:
    """Whether a run has begun in a job's folder, and nothing is said of what to do with it."""
    said = any(word.partition("=")[0] == "resume" for word in overrides)
    return run_folder.is_run(out) and not said and not _starts_anyway(overrides)


def configuration(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> str:
    """What a job would write as its ``config.yaml``."""
    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose

    return compose(overrides, load_parts(), config_dirs).yaml


def _starts_anyway(overrides: Sequence[str]) -> bool:
    """Whether what is there does not matter: it is replaced, or nothing is trained."""
    return any(word.lower() in ("overwrite=true", "dry_run=true") for word in overrides)
