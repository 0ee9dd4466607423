"""A manifest of sizes and hashes, written last: a folder without one, or that disagrees with it, is not whole."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dora_cli.checkpoints.atomic import atomic_write_text
from dora_cli.checkpoints.json_io import read_json, take
from dora_cli.errors import UserError

NAME = "manifest.json"
HASHERS = 2  # threads: each hashes about 1 GB/s, a disk rarely gives more than two of them ask for


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Write ``manifest.json``: size in bytes and SHA-256 of every other file below ``folder``."""
    root = Path(folder)
    names = sorted(_files(root))
    with ThreadPoolExecutor(HASHERS) as workers:
        hashes = workers.map(_sha256, [root / name for name in names])
        files = {
            name: {"bytes": (root / name).stat().st_size, "sha256": h} for name, h in zip(names, hashes, strict=True)
        }
    atomic_write_text(root / NAME, json.dumps({"files": files}, indent=1))


def verify_if_listed(folder: str | os.PathLike[str]) -> None:
    """Check what ``folder`` has a manifest of, if it has one: models and adapters of others have none.

    Files beside those in the manifest are no damage: people put model cards there.

    Raises:
        UserError: as ``verify_manifest``.
    """
    if not (Path(folder) / NAME).is_file():
        return
    try:
        verify_manifest(folder, others=True)
    except UserError as error:
        hint = f"take it from a copy, or delete its {NAME} if it was changed on purpose"
        raise UserError(error.message, where=error.where, hint=hint) from None


def verify_manifest(folder: str | os.PathLike[str], *, others: bool = False) -> None:
    """Check every file below ``folder`` against its manifest.

    Args:
        others: whether there may be files that are not in it.

    Raises:
        UserError: naming the first file that is missing, unlisted, of another size (both sizes) or of other content.
    """
    root = Path(folder)
    if not (root / NAME).is_file():
        raise UserError(f"{root} is not whole", where=f"it has no {NAME}, which is written last")
    listed = take(read_json(root / NAME), "files", dict, root / NAME)
    found = _files(root)
    for name in sorted(listed.keys() | found):
        if name not in found:
            raise UserError(f"{root} is damaged", where=f"{name} is missing")
        if name not in listed and not others:
            raise UserError(f"{root} is damaged", where=f"{name} is not in its manifest")
    with ThreadPoolExecutor(HASHERS) as workers:
        list(workers.map(lambda name: _verify_file(root, name, listed[name]), sorted(listed)))


def _verify_file(root: Path, name: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{root / NAME} is damaged", where=f"the entry of {name} is not an object")
    expected = take(entry, "bytes", int, root / NAME)
    size = (root / name).stat().st_size
    if size != expected:
        raise UserError(f"{root} is damaged", where=f"{name} has {size:,} bytes, its manifest says {expected:,}")
    if _sha256(root / name) != take(entry, "sha256", str, root / NAME):
        raise UserError(f"{root} is damaged", where=f"{name} has its {size:,} bytes, but not the content it had")


def _files(root: Path) -> set[str]:
    """Every file below ``root`` except its manifest and hidden ones (file systems and viewers leave those behind)."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix() for path in files} - {NAME}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
