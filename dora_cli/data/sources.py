"""Rows by role (train, validation, …): from the hub, a file, or a folder."""

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dora_cli.data import files
from dora_cli.data.origin import DataChoice, Source, open_source, rows_at_start, split_name
from dora_cli.errors import UserError

BUFFER = 10_000  # rows, unless data.shuffle_buffer says otherwise
ROW = "__row__"  # column with a row's number in its file or split, from 0; survives shuffles and cuts


@dataclass(frozen=True)
class RowStream:
    """A split that is read in order, a block at a time, as often as one likes.

    Attributes:
        read: (rows of a block, number of the first row, columns that a block has at least) → blocks.
        size: rows of a block.
        first, last: the rows from ``first`` up to ``last`` are read, or up to the end.
        columns: those of the first block.
    """

    read: Callable[[int, int, tuple[str, ...]], Iterator[Any]]
    size: int
    first: int = 0
    last: int | None = None
    columns: tuple[str, ...] = ()

    def blocks(self, row: int) -> Iterator[Any]:
        """The blocks from row number ``row`` on, each a ``datasets.Dataset`` with ``ROW``."""
        for block in self.read(self.size, row, self.columns):
            if self.last is not None and row + len(block) > self.last:
                block = block.select(range(max(self.last - row, 0)))
            if len(block) == 0:
                return
            yield block.add_column(ROW, np.arange(row, row + len(block)))
            row += len(block)


@dataclass
class Rows:
    """Rows by role, and what was decided on the way.

    Attributes:
        splits: role → ``datasets.Dataset`` with the columns of the source and ``ROW``.
        notes: sentences for the plan and the log: what was held out, skipped or cut.
        origin: role → the file that its rows came from; ``None`` where there is no single text file.
        source: the data set in words, for messages.
        stream: of train where it is not read as a whole; ``splits["train"]`` is then one of its blocks.
        held_out: how many training rows validate, drawn by the seed; ``None`` where other rows do.
    """

    splits: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    origin: dict[str, Path | None] = field(default_factory=dict)
    source: str = ""
    stream: RowStream | None = None
    held_out: int | None = None

    def where(self, role: str, index: int) -> str:
        """Where row ``index`` of ``splits[role]`` stands in its source: file and line, or split and row."""
        row = self.splits[role][index][ROW]
        path = self.origin.get(role)
        return f"{path}, {files.place(path, row)}" if path else f"row {row + 1} of '{role}' in {self.source}"

    def where_in(self, split: Any, index: int) -> str:
        """The same of a split itself, whichever role it has here."""
        role = next((role for role, mine in self.splits.items() if mine is split), None)
        return f"row {split[index][ROW] + 1}" if role is None else self.where(role, index)


def buffer_size(config: Any) -> int | None:
    """Training rows that are read at once where they are streamed; ``None`` where they are read as a whole."""
    return (config.shuffle_buffer or BUFFER) if config.streaming else None


def load_rows(
    config: DataChoice,
    *,
    offline: bool,
    seed: int,
    roles: Sequence[str] | None = None,
    file_role: str = "train",
    stream: int | None = None,
) -> Rows:
    """Read the rows of every role.

    A role's split is ``config.splits[role]`` where there is one of that name, else the role's own name. Without a
    validation split, ``config.holdout`` of train is held out, the same rows for the same seed. ``max_train_samples``
    takes the first rows of a shuffle by ``seed``, ``max_eval_samples`` the first rows as they stand.

    Where train is streamed nobody knows how many rows it has: held out are its first ``max_eval_samples``, and
    ``max_train_samples`` takes the first of those that follow.

    Args:
        config: where the data is and how its splits are called.
        offline: the hub's cache only; nothing reaches for the network.
        seed: decides what is held out and which training rows a cut keeps.
        roles: which to read. By default train, validation and the further roles of ``config.splits``; of those further
            ones, what is absent is skipped with a note, whereas a role asked for here must be there.
        file_role: the role of ``config.path`` where it is one file (or one saved split) rather than a folder of splits.
        stream: train is streamed in blocks of so many rows; ``None``: it is read as a whole.

    Raises:
        UserError: nothing there, a split that is missing or empty, a file that can't be read (with file and line).
    """
    further = [role for role, name in config.splits.items() if name]
    wanted = list(dict.fromkeys(roles or ["train", "validation", *further]))
    with quiet(), network(allowed=not offline):
        source = open_source(config, offline, streams=stream is not None)
        rows = Rows({}, source=source.what)
        for role in wanted:
            name = split_name(source, config.splits, role, file_role)
            if name is not None and role == "train" and stream is not None:
                _stream(rows, source, name, config, stream)
            elif name is not None:
                rows.splits[role] = _read(source, name, role)
                rows.origin[role] = source.file(name)
            elif role == "validation" and stream is not None:
                _hold_out_first(rows, source, config)
            elif role == "validation":
                _hold_out(rows, source, config, seed, file_role)
            elif role == "train" or roles is not None:
                raise UserError(
                    f"there is no '{role}' split in {source.what}",
                    where=f"there: {', '.join(source.names) or 'nothing that can be read'}",
                    hint=f"name it with data.splits.{role}=NAME",
                )
            else:
                rows.notes.append(f"no split '{role}' in {source.what}: not evaluated")
    rows.splits = {role: rows.splits[role] for role in wanted if role in rows.splits}
    _cut(rows, config, seed)
    return rows


def _stream(rows: Rows, source: Source, name: str, config: DataChoice, size: int) -> None:
    if source.blocks is None:
        raise UserError(
            f"data.streaming=true: {source.what} is a saved data set, of which nothing is read before it is needed",
            hint="leave data.streaming out",
        )
    first = 0
    if split_name(source, config.splits, "validation", "train") is None:
        first = rows_at_start(config, f"there is no validation split in {source.what}")
    last = None if config.max_train_samples is None else first + config.max_train_samples

    def read(*how: Any) -> Iterator[Any]:
        assert source.blocks is not None
        return source.blocks(name, *how)

    head = next(RowStream(read, size, first, last).blocks(first), None)
    if head is None:
        raise UserError(
            "the train split is empty" if first == 0 else f"the train split has no more than {first} rows",
            where=f"{source.file(name) or source.what}" + (f"; the first {first} validate" if first else ""),
            hint="lower data.max_eval_samples" if first else None,
        )
    rows.stream = RowStream(read, size, first, last, tuple(c for c in head.column_names if c != ROW))
    rows.splits["train"], rows.origin["train"] = head, source.file(name)


def _hold_out_first(rows: Rows, source: Source, config: DataChoice) -> None:
    """The first rows of train as validation, where it is streamed."""
    name = split_name(source, config.splits, "train", "train")
    if name is None or source.blocks is None:
        raise UserError(f"there is no validation split in {source.what}", hint="name it with data.splits.validation")
    held = rows_at_start(config, f"there is no validation split in {source.what}")
    first: Any = next(source.blocks(name, held, 0), [])
    rows.splits["validation"] = _numbered(first, source, name, "train")
    rows.origin["validation"] = source.file(name)
    rows.notes.append(f"no validation split: the first {len(first):,} training rows held out")


def _read(source: Source, name: str, role: str) -> Any:
    return _numbered(source.read(name), source, name, role)


def _numbered(dataset: Any, source: Source, name: str, role: str) -> Any:
    if len(dataset) == 0:
        raise UserError(f"the '{role}' split is empty", where=f"{source.file(name) or source.what} has no rows")
    return dataset.add_column(ROW, np.arange(len(dataset)))


def _hold_out(rows: Rows, source: Source, config: DataChoice, seed: int, file_role: str) -> None:
    """Split validation off train; leaves train shorter where it was read, and reads it where it was not asked for."""
    name = split_name(source, config.splits, "train", file_role)
    if name is None:
        raise UserError(
            f"there is no validation split in {source.what}, and no train split to hold one out of",
            where=f"there: {', '.join(source.names)}",
            hint="name one with data.splits.validation=NAME",
        )
    train = rows.splits.get("train") or _read(source, name, "train")
    total = len(train)
    held = max(1, round(config.holdout * total))
    if held >= total:
        raise UserError(
            f"the train split has {total} row{'s' * (total > 1)}, too few to hold out a validation split",
            where=f"{source.file(name) or source.what}; data.holdout={config.holdout}",
            hint="add rows, or a validation split of its own",
        )
    order = _shuffled(total, seed)
    rows.splits["validation"] = train.select(np.sort(order[:held]))
    rows.held_out = held
    rows.origin["validation"] = source.file(name)
    if "train" in rows.splits:
        rows.splits["train"] = train.select(np.sort(order[held:]))
    asked = config.splits.get("validation") or "validation"
    there = "" if source.single else f" '{asked}' (there: {', '.join(source.names)})"
    rows.notes.append(f"no validation split{there}: {held} of {total} training rows held out by seed {seed}")


def _cut(rows: Rows, config: DataChoice, seed: int) -> None:
    for role, dataset in rows.splits.items():
        limit = config.max_train_samples if role == "train" else config.max_eval_samples
        if limit is None or limit >= len(dataset) or (role == "train" and rows.stream is not None):
            continue
        order = _shuffled(len(dataset), seed) if role == "train" else range(limit)
        rows.splits[role] = dataset.select(order[:limit])
        rows.notes.append(f"{role}: {limit} of {len(dataset)} rows")


def _shuffled(n: int, seed: int) -> Any:
    """The numbers below ``n`` in random order, as an array of 8 bytes each."""
    order = array("q", range(n))
    random.Random(seed).shuffle(order)
    return np.frombuffer(order, np.int64)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and log lines of ``datasets``: the terminal belongs to our own view."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def network(*, allowed: bool) -> Iterator[None]:
    """Make the hub's client refuse every request; ``datasets`` then looks into its cache."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
