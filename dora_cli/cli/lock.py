"""One process per run folder: a lock that ends with its holder, however that ends."""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dora_cli.checkpoints.atomic import HOST, is_alive
from dora_cli.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".dora-train.lock"
PATIENCE = 10.0  # seconds: the workers of a killed process hold its lock until they notice its death, within five
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that knows none


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder that exists, for this process; readers need no lock.

    The system keeps the lock and lets go of it when the process is gone. The file stays: removing it would let two
    processes lock two files of one name.

    Returns:
        Whether the folder is held: False where the system or the file system knows no locks.

    Raises:
        UserError: another process holds it, naming its number and machine where they are known.
        OSError: the file can't be opened.
    """
    if fcntl is None:
        yield False
        return
    file = folder / NAME
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # another user's: it can be asked for all the same
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        held = _take(descriptor, folder)
        if held:
            _write(descriptor, {"pid": os.getpid(), "host": socket.gethostname(), "machine": HOST})
        yield held
        if held:
            _write(descriptor, None)
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> bool:
    begin = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            holder = _read(descriptor)
            orphaned = holder.get("machine") == HOST and not is_alive(int(holder["pid"]))
            if not orphaned or time.monotonic() - begin > PATIENCE:
                who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
                raise UserError(
                    f"out={folder} is in use by {who}", hint="wait until it has ended, or choose another out=DIR"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False


def _read(descriptor: int) -> dict[str, Any]:
    """Who holds the lock, as it was written; empty where that is not known."""
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "machine": found["machine"]}
    except (ValueError, TypeError, KeyError):
        return {}


def _write(descriptor: int, holder: dict[str, Any] | None) -> None:
    """For those who are refused; of a lock file of another user it says nothing."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() if holder else b"", 0)
    except OSError:
        pass
