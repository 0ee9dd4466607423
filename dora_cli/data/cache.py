"""Tensors kept on disk under a digest of all that they follow from, so that no later run makes them again.

Nothing depends on what is kept: whatever is wrong with a file only means that it is made anew. What is too large for
memory has to be written, though, and is read from there.
"""

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dora_cli.errors import UserError

LIMIT = 4 << 30  # bytes that the folder may hold; more where the disk has four times as much left
SPILL = 64 << 20  # bytes of tensors that are in memory while they are made; the rest goes to disk at once
OURS = re.compile(r"\.?[0-9a-f]{64}\.(safetensors|arrow|tmp-\w+)")  # also what a killed process has left unfinished
DTYPES = {torch.int32: "I32", torch.int64: "I64"}  # in the words of safetensors

Block = Mapping[str, Tensor]  # a stretch of every tensor, shape (n,) each


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


def cached(folder: Path | None, key: Callable[[], str], make: Callable[[], Iterable[Block]]) -> dict[str, Tensor]:
    """The tensors that ``make`` gives, from the folder where they are kept there, else made and kept.

    Large ones go to the folder as they are made, and only what is looked at comes back into memory.

    Args:
        folder: made when something is kept; ``None`` only makes, in memory.
        key: gives 64 hexadecimal digits, a digest of all that the tensors follow from.
        make: gives tensors on the CPU in blocks, one at least, each with every tensor's next stretch, shape ``(n,)``.

    Raises:
        UserError: tensors too large for memory, and the folder takes no more.
    """
    if folder is None:
        return _joined(make())
    path = folder / f"{key()}.safetensors"
    tensors = _read(path)
    if tensors is None:
        blocks = iter(make())
        begun = list(_until_large(blocks))
        more = next(blocks, None)
        if more is None:
            tensors = _joined(begun)
            _keep(path, tensors)
        else:
            with whole_file(path) as partial:
                _write(partial, path.stem, chain(_emptied(begun), [more], blocks))
            tensors = _mapped(path)[0]
    return tensors


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write a large file under, which becomes ``path`` in the end, or nothing; older ones make room for it.

    Raises:
        UserError: it can't be written.
    """
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"the data is too large for memory and can't be kept on disk: {error.strerror or error}",
            where=str(path.parent),
            hint="set data.cache=FOLDER on a disk with room, data.streaming=true, or data.cache=null to try in memory",
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    with suppress(OSError):
        forget(path.parent, but=path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.tmp-{os.getpid()}_{secrets.token_hex(4)}")


def _until_large(blocks: Iterator[Block]) -> Iterator[Block]:
    size = 0
    while size < SPILL and (block := next(blocks, None)) is not None:
        size += sum(tensor.nbytes for tensor in block.values())
        yield block


def _emptied(blocks: list[Block]) -> Iterator[Block]:
    while blocks:
        yield blocks.pop(0)


def _joined(blocks: Iterable[Block]) -> dict[str, Tensor]:
    stretches: dict[str, list[Tensor]] = {}
    for block in blocks:
        for name, tensor in block.items():
            stretches.setdefault(name, []).append(tensor)
    return {name: torch.cat(found) for name, found in stretches.items()}


def _read(path: Path) -> dict[str, Tensor] | None:
    """What is kept, or ``None``: nothing, or a file that is damaged or no such file."""
    try:
        tensors, metadata = _mapped(path)
    except (OSError, SafetensorError):
        return None
    if metadata != _metadata(path.stem, {name: _facts(tensor) for name, tensor in tensors.items()}):
        return None
    with suppress(OSError):
        os.utime(path)
    return tensors


def _mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors of a file, and what it says of itself.

    They are private maps of it: read when they are looked at, and writing into them changes no file.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file that appears whole or not at all, or none where the folder takes none."""
    temporary = _partial(path)
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            facts = {name: _facts(tensor) for name, tensor in tensors.items()}
            save_file(dict(tensors), temporary, metadata=_metadata(path.stem, facts))
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        forget(path.parent)


def _write(path: Path, key: str, blocks: Iterable[Block]) -> None:
    """A safetensors file of tensors whose sizes are known at the end only: each goes into a file of its own first."""
    with ExitStack() as stack:
        columns: dict[str, tuple[Any, Any, torch.dtype]] = {}  # name → file, digest, type
        for block in blocks:
            for name, tensor in block.items():
                if name not in columns:
                    spill = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                    columns[name] = spill, sha256(), tensor.dtype
                spill, digest, _ = columns[name]
                spill.write(tensor.numpy().data)
                digest.update(tensor.numpy().data)
        facts, header, start = {}, {}, 0
        # The widest numbers first, as safetensors does it: so every one lies at a multiple of its size.
        order = sorted(columns, key=lambda name: -columns[name][2].itemsize)
        for name in order:
            spill, digest, dtype = columns[name]
            end = start + spill.tell()
            shape = [spill.tell() // dtype.itemsize]
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
            facts[name] = f"{dtype} {shape} {digest.hexdigest()}"
            start = end
        text = json.dumps({"__metadata__": _metadata(key, facts), **header}).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                columns[name][0].seek(0)
                shutil.copyfileobj(columns[name][0], file, 1 << 20)


def _facts(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {sha256(tensor.numpy().data).hexdigest()}"


def _metadata(key: str, facts: Mapping[str, str]) -> dict[str, str]:
    """What a file must say of itself to be believed: its own name, and a digest of its content.

    Args:
        facts: name of a tensor → its type, shape and digest.
    """
    return {"key": key, "sha256": sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}


def forget(folder: Path, but: Path | None = None) -> None:
    """Remove what was not used for longest, until the rest is within the limit; ``but`` this one."""
    found = [(path.stat(), path) for path in folder.iterdir() if OURS.fullmatch(path.name)]
    total, limit = 0, _limit(folder)
    for status, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns, reverse=True):
        total += status.st_size
        if total > limit and path != but:
            path.unlink(missing_ok=True)


def _limit(folder: Path) -> int:
    return max(LIMIT, shutil.disk_usage(folder).free // 4)
