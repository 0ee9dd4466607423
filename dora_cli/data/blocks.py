"""Files that need not fit into memory: their rows in blocks, or on disk where they are mapped from."""

import os
from collections.abc import Iterator
from contextlib import suppress
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path
from typing import Any

from dora_cli.data import files
from dora_cli.data.cache import whole_file
from dora_cli.errors import UserError

LARGE = 64 << 20  # bytes from which on a file is not read into memory
ROWS = 1000  # of a block that goes to disk
FORMAT = 1  # of what is kept: raise it when the same file becomes other rows
DIGEST = 32  # bytes after the end of the rows: their SHA-256


def blocks(path: Path, size: int, first: int = 0, columns: tuple[str, ...] = ()) -> Iterator[Any]:
    """The rows of a file from number ``first`` on, each ``size`` of them as a ``datasets.Dataset``.

    A block follows from its own rows alone, whatever came before it.

    Args:
        columns: those that a block of jsonl has at least; empty where none of its rows names them.

    Raises:
        UserError: as :func:`files.read` does, when it comes to the block; a JSON list, which has no lines.
    """
    kind = path.suffix.lower()
    if kind not in files.READERS or path.stat().st_size == 0:
        files.read(path)  # refuses it
    if kind == ".parquet":
        yield from _parquet_blocks(path, size, first)
    elif kind in (".csv", ".tsv"):
        records = files.csv_rows(path)
        header = next(records)[1]
        rows = (fields for _, fields in islice(records, first, None))
        while block := list(islice(rows, size)):
            yield files.table_dataset(header, block)
    elif files.is_json_list(path):
        raise UserError(
            "data.streaming=true: a JSON list can't be read piece by piece",
            where=str(path),
            hint="write it as jsonl, one object a line",
        )
    else:
        objects = files.json_rows(path, first)
        while found := list(islice(objects, size)):
            yield files.json_dataset(found, {name: set() for name in columns}, path, first)
            first += len(found)


def _parquet_blocks(path: Path, size: int, first: int) -> Iterator[Any]:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    with files.parquet_errors(path), parquet.ParquetFile(path) as file:
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
        groups, skip = list(range(file.num_row_groups)), first
        while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
            skip -= file.metadata.row_group(groups.pop(0)).num_rows
        waiting: list[Any] = []  # record batches end where row groups do; blocks do not
        for batch in file.iter_batches(size, row_groups=groups) if groups else ():
            passed = min(skip, len(batch))
            waiting.append(batch.slice(passed))
            skip -= passed
            while sum(map(len, waiting)) >= size:
                table = pa.Table.from_batches(waiting)
                yield _dataset(table.slice(0, size), features)
                waiting = table.slice(size).to_batches()
        if sum(map(len, waiting)):
            yield _dataset(pa.Table.from_batches(waiting), features)


def _dataset(table: Any, features: Any) -> Any:
    import datasets

    return datasets.Dataset(datasets.table.InMemoryTable(table.combine_chunks()).cast(features.arrow_schema))


def read(path: Path, folder: Path | None) -> Any:
    """The rows of a file; those of a large one lie on disk, and only what is looked at is in memory.

    Args:
        folder: where rows of large files are kept (see :mod:`dora_cli.data.cache`), under a digest of the file;
            ``None``: nowhere, and every file is read into memory.

    Raises:
        UserError: as :func:`files.read` does; the folder takes no more.
    """
    lines = path.suffix.lower() in (".csv", ".tsv") or (
        path.suffix.lower() in (".jsonl", ".json") and path.stat().st_size > 0 and not files.is_json_list(path)
    )
    if folder is None or not lines or path.stat().st_size < LARGE:  # parquet is mapped by ``datasets``
        return files.read(path)
    return _mapped(path, folder)


def _mapped(path: Path, folder: Path) -> Any:
    import datasets

    digest = sha256(f"{FORMAT} {datasets.__version__} {path.suffix.lower()} ".encode())
    with path.open("rb") as file:
        digest.update(file_digest(file, "sha256").digest())
    kept = folder / f"{digest.hexdigest()}.arrow"
    if not _is_whole(kept):
        with whole_file(kept) as partial:
            _write(path, partial)
    with suppress(OSError):
        os.utime(kept)
    return datasets.Dataset.from_file(str(kept))


def _is_whole(path: Path) -> bool:
    """Whether what is kept ends with a digest of all that comes before it."""
    try:
        left, digest = path.stat().st_size - DIGEST, sha256()
        with path.open("rb") as file:
            while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
            return file.read() == digest.digest()
    except OSError:
        return False


def _write(path: Path, kept: Path) -> None:
    """The rows of a file as arrow's stream, and its digest.

    A type that only later rows ask for is known when all have been read; the file is then read once more.
    """
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    schema = None
    while True:
        fits = True
        with kept.open("wb") as file:
            writer = None
            for block in _of_one_type(path, kinds):
                now = block.features.arrow_schema
                if writer is None:
                    schema = now
                    writer = pa.ipc.new_stream(file, schema)
                fits = fits and now == schema
                if fits:
                    writer.write_table(block.data.table.cast(schema))
            if writer is not None:
                writer.close()
        if fits:
            break
    with kept.open("r+b") as file:
        file.write(file_digest(file, "sha256").digest())


def _of_one_type(path: Path, kinds: dict[str, set[type]]) -> Iterator[Any]:
    """All rows of a file of lines in blocks, whose types are those of all values that ``kinds`` has seen."""
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from blocks(path, ROWS)
        return
    rows, first = files.json_rows(path), 0
    while found := list(islice(rows, ROWS)):
        yield files.json_dataset(found, kinds, path, first)
        first += len(found)
