"""Tensors kept on disk under a digest of all that they follow from, so that no later run makes them again.

Nothing depends on it: whatever is wrong with a file or with the folder only means that the tensors are made anew.
"""

import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LIMIT = 4 << 30  # bytes that the folder may hold; what was not used for longest goes first
OURS = re.compile(r"\.?[0-9a-f]{64}\.(safetensors|tmp-\w+)")  # also what a killed process has left unfinished


def cache_folder(choice: str | None) -> Path | None:
    """The folder that ``data.cache`` means, made only when something is kept; ``None`` where nothing is to be kept.

    Args:
        choice: ``auto`` for ``$XDG_CACHE_HOME/dora_cli`` (without it ``~/.cache/dora_cli``), a folder, or ``None``.
            The word ``false`` is taken for ``None``.
    """
    if choice is None or choice == "false":
        return None
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dora_cli")
    try:
        return (default if choice == "auto" else Path(choice)).expanduser() / "tokens"
    except RuntimeError:  # a user without a home
        return None


def cached(folder: Path | None, key: Callable[[], str], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that ``make`` gives, from the folder where they are kept there, else made and kept.

    Args:
        folder: made when something is kept; ``None`` only makes.
        key: gives 64 hexadecimal digits, a digest of all that the tensors follow from.
        make: gives tensors on the CPU, shape ``(n,)`` each.
    """
    if folder is None:
        return make()
    path = folder / f"{key()}.safetensors"
    tensors = _read(path)
    if tensors is None:
        tensors = make()
        _keep(path, tensors)
    return tensors


def _read(path: Path) -> dict[str, Tensor] | None:
    """What is kept, or ``None``: nothing, or a file that is damaged or no such file.

    The tensors are private maps of the file: read when they are looked at, and writing into them changes no file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if metadata != _metadata(path, tensors):
        return None
    with suppress(OSError):
        os.utime(path)
    return tensors


def _keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file that appears whole or not at all, or none where the folder takes none."""
    if sum(tensor.nbytes for tensor in tensors.values()) > LIMIT:
        return
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}_{secrets.token_hex(4)}")
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(dict(tensors), temporary, metadata=_metadata(path, tensors))
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _forget(path.parent)


def _metadata(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file must say of itself to be believed: its own name, and a digest of its content."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return {"key": path.stem, "sha256": digest.hexdigest()}


def _forget(folder: Path) -> None:
    """Remove what was not used for longest, until the rest fits into ``LIMIT``."""
    found = [(path.stat(), path) for path in folder.iterdir() if OURS.fullmatch(path.name)]
    total = 0
    for status, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns, reverse=True):
        total += status.st_size
        if total > LIMIT:
            path.unlink(missing_ok=True)
