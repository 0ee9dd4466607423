"""Files and folders that appear whole or not at all.

Everything is written beside its final name, as ``.NAME.tmp-HOST-PID-TOKEN-N``, flushed to the disk (files, then
folders), and renamed last. A killed process leaves at most such a leftover, which no reader takes for the real thing,
and which the next writer of that name removes.
"""

import ctypes
import glob
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from dora_cli.errors import UserError

if TYPE_CHECKING:  # a lock, a text file and whether a process lives need no torch
    from torch import Tensor


def _where() -> str:
    """What a process number is unique in: this machine, and of its containers this one."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text(encoding="utf-8", errors="replace"))
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return sha256("\0".join(parts).encode()).hexdigest()[:6]


HOST = _where()
TOKEN = secrets.token_hex(4)  # of this process; in a container the next one may well have the same number
LEFTOVER = re.compile(r"\..+\.tmp-([0-9a-f]{6})-(\d+)-([0-9a-f]{8})-\d+", re.DOTALL)
_numbers = count()


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what is there in one step."""
    with _whole_file(Path(path)) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], data: str) -> None:
    """Write ``data`` as UTF-8 to ``path``, replacing what is there in one step."""
    atomic_write_bytes(path, data.encode())


def save_tensors(
    path: str | os.PathLike[str], tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, replacing what is there in one step.

    Views, transposed tensors and tensors that share memory are written as what they show: each gets its own bytes.
    """
    from safetensors.torch import save_file

    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses shared memory, and would write a view's whole storage
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    with _whole_file(Path(path)) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(own, temporary, metadata={"format": "pt", **(metadata or {})})
        temporary.chmod(mode)  # safetensors makes files that only their owner can read, whatever the umask says


def require_new_folder(out: Path) -> None:
    """What a user names as ``out`` must become a folder by a rename.

    Raises:
        UserError: it holds something, is a file or below one, or is where this process is: that would be left without
            a folder.
    """
    above = next((folder for folder in out.absolute().parents if folder.exists()), Path("/"))
    if not above.is_dir():
        raise UserError(f"out={out} cannot be made: {above} is a file", hint="name a new folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out={out} exists and is not empty", hint="name a new folder, or empty this one first")
    if out.resolve() == Path.cwd():
        hint = "name a new folder: it appears whole, by a rename"
        raise UserError(f"out={out} is the folder that you are in", hint=hint)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends without an exception, and is removed otherwise.

    Args:
        path: the folder to make; parents are made as needed. An empty folder there is replaced.
        replace: whether a folder that holds something may be replaced. Old and new change places in one system call
            where the system has one (Linux, macOS); elsewhere the old one is renamed aside for an instant.

    Raises:
        FileExistsError: ``path`` holds something and ``replace`` is false; raised before anything is written.
    """
    path = Path(os.path.realpath(path))  # a rename onto a symbolic link would replace the link
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if replace and path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
        _sync(path.parent)
    finally:
        # what is still under the temporary name is an unfinished folder, or the old one after an exchange
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder", where="a file is to be written there", hint="move it out of the way")
    temporary = _beside(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "*", *, everyone: bool = False) -> list[Path]:
    """Remove what processes of this machine that are gone have left unfinished in ``folder`` under ``name``.

    Args:
        name: of the file or folder they were writing, or a pattern.
        everyone: also what processes elsewhere have left: for a folder in which nobody else can be writing, but for
            evaluations (``eval-*``, ``predictions-*``), whose leftovers stay.

    Returns:
        What was removed.
    """
    swept = []
    for path in folder.glob(f".{name}.tmp-*"):
        mine = f"-{os.getpid()}-{TOKEN}-" in path.name
        elsewhere = everyone and not mine and not path.name.startswith((".eval-", ".predictions-"))
        if not elsewhere and not _is_orphan(path.name):
            continue
        with suppress(OSError):  # another user's
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            swept.append(path)
    return swept


def _is_orphan(name: str) -> bool:
    found = LEFTOVER.fullmatch(name)
    if found is None or found[1] != HOST or os.name != "posix":
        return False
    pid, token = int(found[2]), found[3]
    return token != TOKEN if pid == os.getpid() else not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of this number (POSIX; elsewhere it is taken to have)."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _beside(path: Path) -> Path:
    sweep(path.parent, glob.escape(path.name))
    return path.with_name(f".{path.name}.tmp-{HOST}-{os.getpid()}-{TOKEN}-{next(_numbers)}")


def _sync(path: Path) -> None:
    """Flush a file or a folder (its names) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two paths; afterwards ``new`` names the old content.

    The system call leaves no moment without a whole folder under ``old``, which two renames would.
    """
    if not _swap(new, old):
        aside = _beside(old)
        old.rename(aside)
        try:
            new.rename(old)
        except BaseException:
            aside.rename(old)
            raise
        aside.rename(new)


def _swap(one: Path, other: Path) -> bool:
    """Let two paths change places at once; false where the system or the file system has no such call."""
    at_cwd, exchange, swap = -100, 2, 2
    try:
        if sys.platform == "linux":
            call = ctypes.CDLL(None).renameat2
            return call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(os.fsencode(one), os.fsencode(other), swap) == 0
    except AttributeError:  # a C library without it
        pass
    return False
