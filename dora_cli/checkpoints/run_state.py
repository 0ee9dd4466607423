"""A run's checkpoints: ``checkpoints/step-00000400/``, each whole or absent, verified before it is believed."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dora_cli.checkpoints.atomic import atomic_folder, atomic_write_text, save_tensors
from dora_cli.checkpoints.json_io import read_json
from dora_cli.checkpoints.manifest import verify_manifest, write_manifest
from dora_cli.errors import UserError

PREFIX = "step-"
STATE = "state.json"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    rest: Mapping[str, Any],
    *,
    copies: Iterable[Path] = (),
    keep_last: int,
) -> Path:
    """Write one checkpoint into ``folder`` (the run's ``checkpoints``), then delete all but the newest ``keep_last``.

    Args:
        tensors: file stem → tensors, one safetensors file each.
        rest: what goes into ``state.json``.
        copies: files and folders of the run as they are now, to be put back on resume; those that exist.
    """
    target = folder / f"{PREFIX}{step:08d}"
    with atomic_folder(target, replace=True) as partial:
        for stem, group in tensors.items():
            save_tensors(partial / f"{stem}.safetensors", dict(group))
        atomic_write_text(partial / STATE, json.dumps(rest))
        for path in copies:
            if path.is_dir():
                shutil.copytree(path, partial / path.name)
            elif path.exists():
                shutil.copyfile(path, partial / path.name)
        write_manifest(partial)
    for old in _checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return target


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a sentence about each newer one that is damaged."""
    damaged = []
    for path in reversed(_checkpoints(folder)):
        try:
            verify_manifest(path)
        except UserError as error:
            damaged.append(str(error).replace("\n  ", ": "))
        else:
            return path, damaged
    return None, damaged


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint that ``newest_checkpoint`` found whole.

    Raises:
        UserError: its files are as its manifest says, and still not what a checkpoint holds.
    """
    rest = read_json(path / STATE)
    return {file.stem: _tensors(file) for file in sorted(path.glob("*.safetensors"))}, rest


def put_back(checkpoint: Path, folder: Path) -> None:
    """Make ``folder`` what it was when ``checkpoint`` was written, where its copy is; absent where it was."""
    copy = checkpoint / folder.name
    if not copy.is_dir():
        if folder.is_dir():
            shutil.rmtree(folder)
        return
    with atomic_folder(folder, replace=True) as partial:
        shutil.copytree(copy, partial, dirs_exist_ok=True)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged", where=str(error)) from error


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first; leftovers of interrupted writes have other names."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name[len(PREFIX) :].isdigit())
