"""One data file → ``datasets.Dataset``, with file and line where it is malformed."""

import csv
import glob
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dora_cli.errors import UserError

DEEP = "it is nested too deeply"


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
        lines: Iterator[int] = (line for line, _ in islice(_csv_rows(path), 1, None))
    elif kind in (".jsonl", ".json") and not _is_json_list(path):
        lines = (line for line, text in _lines(path) if text.strip())
    else:
        return f"row {row + 1}"
    return next((f"line {line}" for i, line in enumerate(lines) if i == row), f"row {row + 1}")


def first_line(error: BaseException) -> str:
    """The first line of an error, for a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _root(error: BaseException) -> BaseException:
    """The innermost cause; a failing disk is raised as it is, since nothing is wrong with the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError):
        raise error
    return error


def _read_json(path: Path) -> Any:
    import datasets

    # Arrow takes bytes that are no UTF-8, and fails when a row is looked at; a file of `null` ends the process.
    firsts = Counter(text.lstrip()[:1] for _, text in _lines(path))
    sound = not _json_problem(path) if _is_json_list(path) else firsts.keys() - {""} == {"{"}
    try:
        if not sound:
            raise ValueError("not objects")
        # Names are read as patterns, so a bracket in one must be escaped.
        files = {"train": glob.escape(str(path))}
        return datasets.load_dataset("json", data_files=files, split="train")
    except (StopIteration, ValueError, RecursionError, datasets.exceptions.DatasetsError) as error:
        line, problem = _json_problem(path) or (None, first_line(_root(error)))
        at = f"{path}, line {line}" if line else str(path)
        hint = "the list must hold objects" if _is_json_list(path) else "every line must be one object"
        raise UserError(f"malformed JSON: {problem}", where=at, hint=hint) from error


def _json_problem(path: Path) -> tuple[int | None, str] | None:
    """The first line that can't be a row beside the lines before it, and why."""
    if _is_json_list(path):
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            return error.lineno, f"{error.msg} at column {error.colno}"
        except RecursionError:
            return None, DEEP
        if not rows:
            return None, "there are no rows"
        wrong = [i for i, row in enumerate(rows) if not isinstance(row, dict)]
        return (None, f"entry {wrong[0] + 1} is no object") if wrong else None
    kinds: dict[str, str] = {}
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_no_repeats)
        except json.JSONDecodeError as error:
            return line, f"{error.msg} at column {error.colno}"
        except RecursionError:
            return line, DEEP
        except ValueError as error:
            return line, str(error)
        if not isinstance(row, dict):
            return line, f"{text.strip()[:40]} is no object"
        for name, kind in ((name, _kind(value)) for name, value in row.items() if value is not None):
            if kinds.setdefault(name, kind) != kind:
                return line, f"'{name}' is {kind}, in earlier lines {kinds[name]}"
    return None if kinds else (None, "there are no rows")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key '{next(n for n in names if names.count(n) > 1)}' occurs twice")
    return row


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", str: "text", dict: "an object", list: "a list"}
    return kinds.get(type(value), "a number")


def _is_json_list(path: Path) -> bool:
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
    import datasets

    records = _csv_rows(path)
    columns: dict[str, list[str]] = {name: [] for name in next(records)[1]}
    for _, fields in records:
        for values, value in zip(columns.values(), fields, strict=True):
            values.append(value)
    strings = datasets.Features({name: datasets.Value("string") for name in columns})
    return datasets.Dataset.from_dict(columns, features=strings)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
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
                hint="quote a field that holds a comma" if path.suffix.lower() == ".csv" else None,
            )
        yield line, fields
    if not header:
        raise UserError("there is no line of column names", where=str(path))


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

    try:
        return datasets.load_dataset("parquet", data_files={"train": glob.escape(str(path))}, split="train")
    except (ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise UserError("the parquet file can't be read", where=f"{path}: {first_line(_root(error))}") from error


READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
