"""One data file → ``datasets.Dataset``, with file and line where it is malformed."""

import csv
import glob
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from dora_cli.errors import UserError

DEEP = "it is nested too deeply"
EXACT = 2**53  # above it a float leaves out whole numbers
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a character that JSON writes as a pair; alone it has no UTF-8


def read(path: Path) -> Any:
    """The rows of a jsonl, json, csv, tsv or parquet file.

    json is a list of objects, or jsonl. csv and tsv start with a line of column names and give strings only, since
    guessing types turns a text ``007`` into 7; csv may quote fields, tsv knows no quotes (text/tab-separated-values).

    Raises:
        UserError: unknown ending, not UTF-8, malformed (with the line), or without rows.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"data.path={path}: unknown kind of file '{path.suffix}'",
            hint=f"it must end in {', '.join(READERS)}",
        )
    if path.stat().st_size == 0:
        raise UserError("the data file is empty", where=str(path))
    return reader(path)


def place(path: Path, row: int) -> str:
    """Where row number ``row`` (from 0) stands in a file that has been read: ``line 7``, or ``row 7``."""
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        lines: Iterator[int] = (line for line, _ in islice(csv_rows(path), 1, None))
    elif kind in (".jsonl", ".json") and not is_json_list(path):
        lines = (line for line, text in _lines(path) if text.strip())
    else:
        return f"row {row + 1}"
    return next((f"line {line}" for i, line in enumerate(lines) if i == row), f"row {row + 1}")


def first_line(error: BaseException) -> str:
    """The first line of an error, for a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _root(error: BaseException) -> BaseException:
    """The innermost cause; a failing disk is raised as it is, since nothing is wrong with the file.

    Arrow raises an OSError without a number where a file is damaged.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return error


def _read_json(path: Path) -> Any:
    return json_dataset(json_rows(path), {}, path)


def json_dataset(rows: Iterable[dict[str, Any]], kinds: dict[str, set[type]], path: Path, first: int = 0) -> Any:
    """The rows as a ``datasets.Dataset``, whose types are those of all values that were ever seen.

    By Python's reader: arrow's makes dates of texts that look like one, and rounds whole numbers that are large.

    Args:
        kinds: column → types seen so far; those of ``rows`` are added.
        path: where they come from, for messages.
        first: number in the file of the first of them.
    """
    import datasets

    columns: dict[str, list[Any]] = {name: [] for name in kinds}
    for count, row in enumerate(rows):
        for name, value in row.items():
            if name not in columns:
                columns[name] = [None] * count
                kinds[name] = set()
            columns[name].append(value)
            kinds[name].add(type(value))
        for values in columns.values():
            if len(values) == count:
                values.append(None)
    if not columns:
        raise _malformed("there are no rows", path)
    features = {}
    for name, values in columns.items():
        columns[name], features[name] = _column(name, kinds[name] - {type(None)}, values, path, first)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def json_rows(path: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """The object of every row from number ``first`` on; lines before it are passed over unread."""
    if is_json_list(path):
        text = "".join(text for _, text in _lines(path))
        for i, row in enumerate(_parsed(text, path, None), start=1):
            if not isinstance(row, dict):
                raise _malformed(f"entry {i} is no object", path)
            yield row
        return
    for line, text in islice(((line, text) for line, text in _lines(path) if text.strip()), first, None):
        row = _parsed(text, path, line)
        if not isinstance(row, dict):
            raise _malformed(f"{text.strip()[:40]} is no object", path, f"line {line}")
        yield row


def _parsed(text: str, path: Path, line: int | None) -> Any:
    """The value of ``text``, which is one line of a file, or where ``line`` is None all of it."""
    at = f"line {line}" if line else None
    try:
        value = DECODER.decode(text.rstrip("\r\n") if line else text)
        if HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        at = f"line {line or error.lineno}"
        raise _malformed(f"{error.msg} at column {error.colno}", path, at) from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x} is half a character"
        raise _malformed(half, path, at) from error
    except RecursionError as error:
        raise _malformed(DEEP, path, at) from error
    except ValueError as error:
        raise _malformed(first_line(error), path, at) from error


def _malformed(problem: str, path: Path, at: str | None = None) -> UserError:
    hint = "the list must hold objects" if is_json_list(path) else "every line must be one object"
    return UserError(f"malformed JSON: {problem}", where=f"{path}, {at}" if at else str(path), hint=hint)


def _column(name: str, kinds: set[type], values: list[Any], path: Path, first: int) -> tuple[list[Any], Any]:
    """The values of a column with ``kinds`` of them, as ``datasets`` takes them, and their type."""
    import datasets

    if kinds and kinds <= {int, float}:
        return values, _number_type(name, values, float in kinds, path, first)
    if kinds in (set(), {str}, {bool}):
        return values, datasets.Value({str: "string", bool: "bool"}[kinds.pop()] if kinds else "null")
    if hasattr(datasets, "Json"):
        return [_as_json(name, value, path, i) for i, value in enumerate(values, start=first)], datasets.Json()
    try:  # older versions know one type for all values of a column only
        return values, datasets.Dataset.from_dict({name: values}).features[name]
    except (TypeError, ValueError) as error:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise _malformed(f"'{name}' is of several kinds ({names})", path) from error


def _as_json(name: str, value: Any, path: Path, row: int) -> str | None:
    """What a column of any kinds holds; written here, since ``datasets`` takes the text ``null`` for no text."""
    import datasets

    if value is None:
        return None
    try:
        text = json.dumps(value, allow_nan=False)
        datasets.Json().decode_example(text)
    except ValueError as error:
        raise _malformed(f"'{name}': {first_line(error)}", path, place(path, row)) from error
    return text


def _number_type(name: str, values: list[Any], is_float: bool, path: Path, first: int) -> Any:
    import datasets

    low, high = (-EXACT, EXACT) if is_float else (-(2**63), 2**63 - 1)
    for i, value in enumerate(values, start=first):
        if isinstance(value, int) and not low <= value <= high:
            raise UserError(
                f"'{name}' is too large a number to be kept as it is",
                where=f"{path}, {place(path, i)}",
                hint="quote the numbers of this column, to read them as text",
            )
    return datasets.Value("float64" if is_float else "int64")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key '{next(n for n in names if names.count(n) > 1)}' occurs twice")
    return row


def is_json_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if b"\0" in line:
                raise UserError("not text: there is a NUL byte", where=where, hint="save the file as UTF-8")
            try:
                yield number, line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"not UTF-8 text: byte {line[error.start]:#04x} at column {error.start + 1}",
                    where=where,
                    hint="save the file as UTF-8",
                ) from error


def _read_table(path: Path) -> Any:
    records = csv_rows(path)
    return table_dataset(next(records)[1], (fields for _, fields in records))


def table_dataset(header: list[str], rows: Iterable[list[str]]) -> Any:
    """Records of a csv or tsv file as a ``datasets.Dataset`` of strings."""
    import datasets

    columns: dict[str, list[str]] = {name: [] for name in header}
    for fields in rows:
        for values, value in zip(columns.values(), fields, strict=True):
            values.append(value)
    strings = datasets.Features({name: datasets.Value("string") for name in columns})
    return datasets.Dataset.from_dict(columns, features=strings)


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """First line and fields of the header and of every row, each checked to have as many fields as the header."""
    header: list[str] = []
    for line, fields in _csv_records(path):
        if not header:
            header = fields
            repeated = [name for name in header if header.count(name) > 1]
            if repeated:
                raise UserError(f"column '{repeated[0]}' occurs twice", where=f"{path}, line {line}")
        if len(fields) != len(header):
            raise UserError(
                f"{len(fields)} field{'s' * (len(fields) != 1)} instead of {len(header)} ({', '.join(header)})",
                where=f"{path}, line {line}",
                hint=_separator_hint(path, header),
            )
        yield line, fields
    if not header:
        raise UserError("there is no line of column names", where=str(path))


def _separator_hint(path: Path, header: list[str]) -> str | None:
    if path.suffix.lower() != ".csv":
        return None
    if len(header) == 1 and ";" in header[0]:
        return "its columns are separated by ';': save it with commas, or as .tsv with tabs"
    return "quote a field that holds a comma"


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """First line and fields of every record that is not blank."""
    texts = (text for _, text in _lines(path))
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(texts, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses long texts
    first = 1
    try:
        for fields in reader:
            if fields:
                yield first, fields
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"malformed CSV: {error}", where=f"{path}, record that starts in line {first}", hint="check its quotes"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Any:
    import datasets

    with parquet_errors(path):
        return datasets.load_dataset("parquet", data_files={"train": glob.escape(str(path))}, split="train")


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """What arrow and ``datasets`` raise of a file that is damaged, as one message."""
    import datasets

    try:
        yield
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise UserError("the parquet file can't be read", where=f"{path}: {first_line(_root(error))}") from error


DECODER = json.JSONDecoder(object_pairs_hook=_no_repeats)
READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
