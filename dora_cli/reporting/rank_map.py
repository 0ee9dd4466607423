"""Where the rank is: target modules laid out as a grid of layers by kinds of module."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")  # up to the first number: the layer; the rest: which of its modules


@dataclass(frozen=True)
class Grid:
    """Target modules in rows and columns.

    ``cells[row][column]`` is a module's full name, None where a layer has no such module.
    """

    rows: list[str]  # layers, as far as their names differ
    columns: list[str]  # kinds of module, the shortest names that tell them apart
    cells: list[list[str | None]]


def arrange(modules: Sequence[str]) -> Grid:
    """Lay out modules by their full names, rows and columns in the order in which they come."""
    where = {name: _split(name) for name in modules}
    layers = list(dict.fromkeys(layer for layer, _ in where.values()))
    kinds = list(dict.fromkeys(kind for _, kind in where.values()))
    at = {place: name for name, place in where.items()}
    cells = [[at.get((layer, kind)) for kind in kinds] for layer in layers]
    return Grid(short_heads(layers), short_tails(kinds), cells)


def short_tails(names: Sequence[str]) -> list[str]:
    """Each name's shortest ending, in whole words between dots, that no other name has."""
    found = []
    for name in names:
        words = name.split(".")
        endings = [".".join(words[-n:]) for n in range(1, len(words) + 1)]
        taken = {other for other in names if other != name}
        found.append(next((e for e in endings if not any(f".{o}".endswith(f".{e}") for o in taken)), name))
    return found


def short_heads(names: Sequence[str]) -> list[str]:
    """The names without the words that all of them begin with; the last word always stays."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(words) > shared + 1 and words[shared] == split[0][shared] for words in split):
        shared += 1
    return [".".join(words[shared:]) for words in split]


def _split(name: str) -> tuple[str, str]:
    match = LAYER.match(name)
    if match:
        return match[1], match[2]
    parent, _, last = name.rpartition(".")
    return parent, last
