"""One process per run folder: a lock that ends with its holder, however that ends."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dora_cli.checkpoints.atomic import is_alive
from dora_cli.errors import UserError

NAME = ".lock"
PATIENCE = 10.0  # seconds: the workers of a killed process notice its death within five, and hold the lock till then


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder that exists, for this process; readers need no lock.

    The system keeps the lock and lets go of it when the process is gone. The file stays: removing it would let two
    processes lock two files of one name. Where the file system knows no locks there is none.

    Raises:
        UserError: another process holds it, naming its number and machine where they are known.
    """
    file = folder / NAME
    holder = _holder(file)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0 if _may_live(holder) else PATIENCE)
    except Timeout:
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        _name_holder(file, holder)  # asking has emptied it
        raise UserError(
            f"out={folder} is in use by {who}", hint="wait until it has ended, or choose another out=DIR"
        ) from None
    except (NotImplementedError, OSError):
        if not os.access(folder, os.W_OK):
            raise
        yield
        return
    try:
        _name_holder(file, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        lock.release()


def _may_live(holder: dict[str, Any]) -> bool:
    return not holder or holder["host"] != socket.gethostname() or is_alive(holder["pid"])


def _holder(file: Path) -> dict[str, Any]:
    """Who took the lock last, as it was written; empty where that is not known."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "host": str(found["host"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _name_holder(file: Path, holder: dict[str, Any]) -> None:
    file.write_text(json.dumps(holder) if holder else "", encoding="utf-8")
