"""Lists of folders on the command line."""

import glob
import os
from os.path import expanduser
from pathlib import Path


def split_list(value: str) -> list[str]:
    """``a,b`` and ``[a,b]`` as their parts; a part that has commas itself is recognised by being there.

    A sweep's folders are called ``budget=0.1,seed=1``.
    """
    if value.startswith("[") and value.endswith("]"):
        value = value[1:-1]
    pieces = [piece.strip().strip("'\"") for piece in value.split(",")]
    found: list[str] = []
    while pieces:
        joined = (n for n in range(len(pieces), 0, -1) if n == 1 or matches(",".join(pieces[:n])))
        n = next(joined)
        found.append(",".join(pieces[:n]))
        del pieces[:n]
    return [part for part in found if part]


def matches(word: str) -> list[Path]:
    """Folders of this name or pattern."""
    word = expanduser(word)
    if os.path.isdir(word):
        return [Path(word)]
    return [Path(found) for found in sorted(glob.glob(word, recursive=True)) if os.path.isdir(found)]
