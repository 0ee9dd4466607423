"""What ``fuzz.py`` tries on data files: valid ones and spoilt ones, from the bytes to the encoded rows."""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import torch
from hypothesis import strategies as st

from dora_cli.config.schema import DataConfig
from dora_cli.data import files
from dora_cli.data.sources import ROW, load_rows
from dora_cli.data.tasks import build_task

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
Row = dict[str, Any]


def tables() -> st.SearchStrategy[list[Row]]:
    """Rows whose columns have one kind each, mostly."""
    label = st.sampled_from(
        [
            st.sampled_from(["yes", "no"]), st.integers(0, 2), st.floats(allow_nan=False, allow_infinity=False),
            st.booleans(), st.sampled_from(["0", "1.5", "-2", "1e39", "007"]), st.integers(-(2**65), 2**65),
            st.sampled_from(mutations.TEXTS), mutations.odd_values(),
        ]
    )  # fmt: skip
    plain = st.sampled_from(
        ["a good film", "bad", "the plot", 'say "so", twice', "2020-01-01", "12:30", "a\nb", "tab\tbed"]
    )
    text = st.sampled_from(
        [plain, plain, st.text(max_size=12), st.sampled_from(mutations.TEXTS), mutations.odd_values()]
    )
    more = st.sampled_from(
        [{}, {}, {"text_pair": plain}, {"id": st.integers()}, {"type": plain, "message": st.just({"a": 1})}]
    )
    columns = st.tuples(text, label, more).map(lambda three: {"text": three[0], "label": three[1], **three[2]})
    return columns.flatmap(lambda kinds: st.lists(row(kinds), min_size=2, max_size=6))


def row(kinds: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Row]:
    """One row, its columns always in this order."""
    return st.tuples(*kinds.values()).map(lambda values: dict(zip(kinds, values, strict=True)))


def written(rows: list[Row], ending: str) -> bytes | None:
    """The rows as a file, or None where they have no such form."""
    if ending == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode(
            "utf-8", "surrogatepass"
        )
    if ending == ".json":
        return json.dumps(rows, indent=1).encode()
    if ending == ".parquet":
        return as_parquet(rows)
    out = io.StringIO(newline="")
    if ending == ".csv":
        csv.DictWriter(out, list(rows[0])).writeheader()
        csv.writer(out).writerows(row.values() for row in rows)
        return out.getvalue().encode("utf-8", "surrogatepass")
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def as_parquet(rows: list[Row]) -> bytes | None:
    import pyarrow
    import pyarrow.parquet

    try:
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, compression="none")
        return out.getvalue()
    except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        return None


# ---- other readers -------------------------------------------------------------------------------------------------
def independently(path: Path) -> list[Row] | None:
    """The rows by Python's own readers, or None where they do not take the file."""
    content = path.read_bytes()
    try:
        if path.suffix == ".parquet":
            return by_arrow(content)
        text = content.decode("utf-8-sig")
        if path.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)
            records = [record for record in csv.reader(io.StringIO(text, newline="")) if record]
        elif path.suffix == ".tsv":
            records = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip("\r")]
        elif text.lstrip().startswith("["):
            return json.loads(text)
        else:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError, csv.Error):
        return None
    return [dict(zip(records[0], record, strict=True)) for record in records[1:]]


def by_arrow(content: bytes) -> list[Row] | None:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError):
        return None


def same(ours: Any, theirs: Any) -> bool:
    """Equal, where a key that is absent from an object is null, and a whole number may be a float of its value."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return all(same(ours.get(key), theirs.get(key)) for key in {*ours, *theirs})
    if isinstance(theirs, list) and isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, float) and isinstance(ours, float):
        # datasets reads the last digit of a float anew where a column has several kinds
        return math.isclose(ours, theirs, rel_tol=1e-13) or (math.isnan(theirs) and math.isnan(ours))
    return isinstance(ours, bool) == isinstance(theirs, bool) and ours == theirs


# ---- the target ----------------------------------------------------------------------------------------------------
def data_files(make: Callable[..., Any]) -> Callable[[Path], Any]:
    """The target ``data``, made by ``make``."""

    def data(folder: Path) -> Any:
        import datasets
        import tiny
        from transformers import AutoTokenizer

        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        tokenizer = AutoTokenizer.from_pretrained(tiny.make_model(folder / "model"))
        example = st.tuples(
            st.sampled_from(ENDINGS),
            tables(),
            mutations.byte_edits(3),
            st.sampled_from(["classification", "regression"]),
        )
        return make("data", example, lambda example: check_data(folder, tokenizer, *example), 2_000)

    return data


def check_data(folder: Path, tokenizer: Any, ending: str, rows: list[Row], changes: list[Any], kind: str) -> None:
    content = written(rows, ending)
    if content is None:
        return
    path = folder / f"file{ending}"
    path.write_bytes(mutations.edit_bytes(content, changes))
    number = check_data.counter = getattr(check_data, "counter", 0) + 1  # type: ignore[attr-defined]
    os.utime(path, (number, number))  # the same name at the same second is what a cache would confuse
    check_rows(path)
    config = DataConfig(task=kind, path=str(path), cache=None, holdout=0.3, max_length=16)
    loaded = load_rows(config, offline=True, seed=0)
    task = build_task(config)
    task.fit(loaded)
    for dataset in loaded.splits.values():
        check_labels(task, dataset, task.encode(dataset, tokenizer))


def check_rows(path: Path) -> None:
    ours, theirs = files.read(path), independently(path)
    assert theirs is None or len(ours) == len(theirs), f"{len(ours)} rows, an independent reader has {len(theirs)}"
    for i, row in enumerate(ours):
        assert list(row) == ours.column_names
        for name in {*row, *theirs[i]} if theirs is not None else ():
            mine, other = row.get(name), theirs[i].get(name)
            assert same(mine, other), f"row {i}, {name!r}: {mine!r:.80}, an independent reader has {other!r:.80}"


def check_labels(task: Any, dataset: Any, encoded: Any) -> None:
    labels, values = encoded.scalars["labels"], [row[task.columns["label"]] for row in dataset]
    assert len(encoded) == len(labels) == len(dataset) and ROW in dataset.column_names
    assert encoded.lengths.min() >= 1 and encoded.lengths.max() <= 16
    assert len(encoded.batch(range(len(dataset)))["input_ids"]) == len(dataset)
    if task.num_labels == 1:
        assert torch.isfinite(labels).all(), f"labels {labels.tolist()}"
        assert torch.allclose(labels, torch.tensor([float(v) for v in values]), rtol=1e-5)
    else:
        named = [task.labels[i] for i in labels.tolist()]
        assert [spelt(name) for name in named] == [spelt(value) for value in values], f"{named} for {values}"


def spelt(label: Any) -> str:
    """A label in one spelling: ``1.0`` as ``1``, ``True`` as ``true``."""
    whole = isinstance(label, float) and label.is_integer()
    text = str(int(label)) if whole else str(label)
    return text.lower() if text.lower() in ("true", "false") else text
