"""Rows by role (train, validation, …): from the hub, a file, or a folder."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path
from typing import Any, Protocol

from dora_cli.data import files
from dora_cli.errors import UserError
from dora_cli.registry import near

ROW = "__row__"  # column with a row's number in its file or split, from 0; survives shuffles and cuts


class DataChoice(Protocol):
    """What this module reads of ``config.schema.DataConfig``."""

    name: str | None
    config: str | None
    path: str | None
    max_train_samples: int | None
    max_eval_samples: int | None
    holdout: float

    @property
    def splits(self) -> Mapping[str, str | None]: ...


@dataclass
class Rows:
    """Rows by role, and what was decided on the way.

    Attributes:
        splits: role → ``datasets.Dataset`` with the columns of the source and ``ROW``.
        notes: sentences for the plan and the log: what was held out, skipped or cut.
        origin: role → the file that its rows came from; ``None`` where there is no single text file.
        source: the data set in words, for messages.
    """

    splits: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    origin: dict[str, Path | None] = field(default_factory=dict)
    source: str = ""

    def where(self, role: str, index: int) -> str:
        """Where row ``index`` of ``splits[role]`` stands in its source: file and line, or split and row."""
        row = self.splits[role][index][ROW]
        path = self.origin.get(role)
        return f"{path}, {files.place(path, row)}" if path else f"row {row + 1} of '{role}' in {self.source}"


@dataclass
class _Source:
    """A data set that has been found: its split names, how to read one, and from which file."""

    what: str
    names: list[str]
    read: Callable[[str], Any]
    file: Callable[[str], Path | None]
    single: bool = False


def load_rows(
    config: DataChoice,
    *,
    offline: bool,
    seed: int,
    roles: Sequence[str] | None = None,
    file_role: str = "train",
) -> Rows:
    """Read the rows of every role.

    A role's split is ``config.splits[role]`` where there is one of that name, else the role's own name. Without a
    validation split, ``config.holdout`` of train is held out, the same rows for the same seed. ``max_train_samples``
    takes the first rows of a shuffle by ``seed``, ``max_eval_samples`` the first rows as they stand.

    Args:
        config: where the data is and how its splits are called.
        offline: the hub's cache only; nothing reaches for the network.
        seed: decides what is held out and which training rows a cut keeps.
        roles: which to read. By default train, validation and the further roles of ``config.splits``; of those further
            ones, what is absent is skipped with a note, whereas a role asked for here must be there.
        file_role: the role of ``config.path`` where it is one file (or one saved split) rather than a folder of splits.

    Raises:
        UserError: nothing there, a split that is missing or empty, a file that can't be read (with file and line).
    """
    further = [role for role, name in config.splits.items() if name]
    wanted = list(dict.fromkeys(roles or ["train", "validation", *further]))
    with quiet(), network(allowed=not offline):
        source = _open(config, offline)
        rows = Rows({}, source=source.what)
        for role in wanted:
            name = _split_name(source, config.splits, role, file_role)
            if name is not None:
                rows.splits[role] = _read(source, name, role)
                rows.origin[role] = source.file(name)
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


def _open(config: DataChoice, offline: bool) -> _Source:
    if config.path:
        path = Path(expanduser(config.path))
        if not path.exists():
            raise UserError(f"data.path={config.path}: no such file or folder", hint=_neighbours(path))
        if path.is_file():
            return _Source(str(path), [path.stem], lambda _: files.read(path), lambda _: path, single=True)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _open_saved(path)
        return _open_folder(path)
    if config.name:
        return _open_hub(config, offline)
    raise UserError("there is no data", hint="set data.path=FILE_OR_FOLDER, or data.name=NAME for a set on the hub")


def _open_folder(folder: Path) -> _Source:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in files.READERS and path.is_file():
            found.setdefault(path.stem, []).append(path)
    if not found:
        raise UserError(
            f"data.path={folder} holds no data files",
            where=f"there: {', '.join(sorted(p.name for p in folder.iterdir())[:10]) or 'nothing'}",
            hint=f"expected train and validation with one of the endings {', '.join(files.READERS)}",
        )

    def file(name: str) -> Path:
        if len(found[name]) > 1:
            raise UserError(
                f"'{name}' is ambiguous: {' and '.join(p.name for p in found[name])}",
                where=f"in {folder}",
                hint="keep one of them, or give data.path the file itself",
            )
        return found[name][0]

    return _Source(str(folder), list(found), lambda name: files.read(file(name)), file)


def _open_saved(folder: Path) -> _Source:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.path={folder}: the saved data set is damaged", where=files.first_line(error)) from error
    if isinstance(saved, datasets.DatasetDict):
        return _Source(str(folder), list(saved), lambda name: saved[name], lambda _: None)
    return _Source(str(folder), ["the saved split"], lambda _: saved, lambda _: None, single=True)


def _open_hub(config: DataChoice, offline: bool) -> _Source:
    import datasets

    what = f"{config.name} ({config.config})" if config.config else str(config.name)
    try:
        splits = datasets.load_dataset(config.name, config.config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = "offline=true reads only the hub's cache" if offline else "check the name and the connection"
        raise UserError(
            f"data.name={what} can't be loaded",
            where=files.first_line(error),
            hint=f"{first}; data.path=FILE_OR_FOLDER reads your own copy",
        ) from error
    return _Source(what, list(splits), lambda name: splits[name], lambda _: None)


def _split_name(source: _Source, splits: Mapping[str, str | None], role: str, file_role: str) -> str | None:
    """The source's name for a role, or ``None``."""
    if source.single:
        return source.names[0] if role == file_role else None
    mapped = splits.get(role) or role
    stem = Path(mapped).stem if Path(mapped).suffix in files.READERS else mapped
    return next((name for name in (stem, role) if name in source.names), None)


def _read(source: _Source, name: str, role: str) -> Any:
    dataset = source.read(name)
    if len(dataset) == 0:
        raise UserError(f"the '{role}' split is empty", where=f"{source.file(name) or source.what} has no rows")
    return dataset.add_column(ROW, list(range(len(dataset))))


def _hold_out(rows: Rows, source: _Source, config: DataChoice, seed: int, file_role: str) -> None:
    """Split validation off train; leaves train shorter where it was read, and reads it where it was not asked for."""
    name = _split_name(source, config.splits, "train", file_role)
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
    rows.splits["validation"] = train.select(sorted(order[:held]))
    rows.origin["validation"] = source.file(name)
    if "train" in rows.splits:
        rows.splits["train"] = train.select(sorted(order[held:]))
    asked = config.splits.get("validation") or "validation"
    there = "" if source.single else f" '{asked}' (there: {', '.join(source.names)})"
    rows.notes.append(f"no validation split{there}: {held} of {total} training rows held out by seed {seed}")


def _cut(rows: Rows, config: DataChoice, seed: int) -> None:
    for role, dataset in rows.splits.items():
        limit = config.max_train_samples if role == "train" else config.max_eval_samples
        if limit is None or limit >= len(dataset):
            continue
        order = _shuffled(len(dataset), seed) if role == "train" else range(limit)
        rows.splits[role] = dataset.select(order[:limit])
        rows.notes.append(f"{role}: {limit} of {len(dataset)} rows")


def _shuffled(n: int, seed: int) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def _neighbours(path: Path) -> str:
    parent = next(p for p in path.parents if p.is_dir())
    there = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    close = near(path.name, there) if parent == path.parent else []
    more = ", …" if not close and len(there) > 10 else ""
    return f"in {parent.absolute()}: {', '.join(close or there[:10]) or 'nothing'}{more}"


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
