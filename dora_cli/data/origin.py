"""Finds a data set: a file, a folder, a saved set or one on the hub; which splits it has, and how one is read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os.path import expanduser
from pathlib import Path
from typing import Any, Protocol

from dora_cli.data import blocks, files
from dora_cli.data.cache import cache_folder
from dora_cli.errors import UserError
from dora_cli.registry import near


class DataChoice(Protocol):
    """What is read of ``config.schema.DataConfig`` to find and read rows."""

    name: str | None
    config: str | None
    path: str | None
    max_train_samples: int | None
    max_eval_samples: int | None
    holdout: float
    cache: str | None

    @property
    def splits(self) -> Mapping[str, str | None]: ...


@dataclass
class Source:
    """A data set that has been found: its split names, how to read one, and from which file.

    ``blocks``: (name, then as :attr:`RowStream.read`) → blocks of a split; ``None`` where there is no need for it.
    """

    what: str
    names: list[str]
    read: Callable[[str], Any]
    file: Callable[[str], Path | None]
    single: bool = False
    blocks: Callable[..., Iterator[Any]] | None = None


def open_source(config: DataChoice, offline: bool, *, streams: bool) -> Source:
    folder = cache_folder(config.cache)
    if config.path:
        path = Path(expanduser(config.path))
        if not path.exists():
            raise UserError(f"data.path={config.path}: no such file or folder", hint=_neighbours(path))
        if path.is_file():
            return Source(
                str(path),
                [path.stem],
                lambda _: blocks.read(path, folder),
                lambda _: path,
                single=True,
                blocks=lambda _, *how: blocks.blocks(path, *how),
            )
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _open_saved(path)
        return _open_folder(path, folder)
    if config.name:
        return _open_hub_stream(config, offline) if streams else _open_hub(config, offline)
    raise UserError("there is no data", hint="set data.path=FILE_OR_FOLDER, or data.name=NAME for a set on the hub")


def _open_folder(folder: Path, cache: Path | None) -> Source:
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

    return Source(
        str(folder),
        list(found),
        lambda name: blocks.read(file(name), cache),
        file,
        blocks=lambda name, *how: blocks.blocks(file(name), *how),
    )


def _open_saved(folder: Path) -> Source:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.path={folder}: the saved data set is damaged", where=files.first_line(error)) from error
    if isinstance(saved, datasets.DatasetDict):
        return Source(str(folder), list(saved), lambda name: saved[name], lambda _: None)
    return Source(str(folder), ["the saved split"], lambda _: saved, lambda _: None, single=True)


def _open_hub(config: DataChoice, offline: bool) -> Source:
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
    return Source(what, list(splits), lambda name: splits[name], lambda _: None)


def _open_hub_stream(config: DataChoice, offline: bool) -> Source:
    import datasets

    what = f"{config.name} ({config.config})" if config.config else str(config.name)
    if offline:
        raise UserError(
            "data.streaming=true reads from the hub, and offline=true forbids it",
            hint="set data.streaming=false to read the hub's cache, or data.path=FILE to stream your own copy",
        )

    def read(name: str, size: int, first: int, columns: tuple[str, ...] = ()) -> Iterator[Any]:
        with _hub_errors(what):
            rows = iter(splits[name].skip(first))
        while True:
            with _hub_errors(what):
                found = list(islice(rows, size))
            if not found:
                return
            found[0] = {**dict.fromkeys(columns), **found[0]}
            yield datasets.Dataset.from_list(found, features=splits[name].features)

    def head(name: str) -> Any:
        return next(read(name, rows_at_start(config, f"the '{name}' split of {what} is streamed"), 0), [])

    with _hub_errors(what):
        splits = datasets.load_dataset(config.name, config.config, streaming=True)
    return Source(what, list(splits), head, lambda _: None, blocks=read)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.name={what} can't be read",
            where=files.first_line(error),
            hint="check the name and the connection; a run that has saved a checkpoint goes on with resume=true",
        ) from error


def rows_at_start(config: DataChoice, why: str) -> int:
    """How many rows are taken where nobody knows how many there are."""
    if config.max_eval_samples is None:
        raise UserError(
            f"data.streaming=true needs data.max_eval_samples=N: {why}",
            hint="say how many of its first rows validate, for example data.max_eval_samples=500",
        )
    return config.max_eval_samples


def split_name(source: Source, splits: Mapping[str, str | None], role: str, file_role: str) -> str | None:
    """The source's name for a role, or ``None``."""
    if source.single:
        return source.names[0] if role == file_role else None
    mapped = splits.get(role) or role
    stem = Path(mapped).stem if Path(mapped).suffix in files.READERS else mapped
    return next((name for name in (stem, role) if name in source.names), None)


def _neighbours(path: Path) -> str:
    parent = next(p for p in path.parents if p.is_dir())
    there = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    close = near(path.name, there) if parent == path.parent else []
    more = ", …" if not close and len(there) > 10 else ""
    return f"in {parent.absolute()}: {', '.join(close or there[:10]) or 'nothing'}{more}"
