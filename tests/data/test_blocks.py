"""Rows in blocks and rows mapped from disk are the rows of a file read as a whole."""

import json
from itertools import chain

import datasets
import pytest

from dora_cli.data import blocks, cache, files, token_rows, tokens
from dora_cli.data.sources import ROW, load_rows
from dora_cli.errors import UserError

OBJECTS = [{"text": f"t {i}", "label": i % 2, "more": [i]} | ({"late": 0.5} if i > 40 else {}) for i in range(53)]
FILES = {
    "jsonl": ("a.jsonl", "\n".join(json.dumps(o) + "\n" * (i % 3) for i, o in enumerate(OBJECTS))),
    "csv": ("a.csv", "text,label\r\n" + "".join(f'"t\n{i}, ""x""",{i}\r\n' for i in range(53))),
    "tsv": ("a.tsv", "text\tlabel\n" + "".join(f'"t {i}\t{i}\n\n' for i in range(53))),
}


@pytest.fixture
def path(request, write, tmp_path):
    if request.param != "parquet":
        return write(*FILES[request.param])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"t{i}" for i in range(53)], "label": [i % 2 for i in range(53)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet", batch_size=7)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("path", [*FILES, "parquet"], indirect=True)
def test_blocks_hold_the_rows_of_the_file_from_any_row_on(path):
    whole = files.read(path)
    columns = tuple(whole.column_names)
    for size, first in ((1, 50), (10, 0), (10, 13), (10, 53), (100, 5)):
        made = list(blocks.blocks(path, size, first, columns))
        assert [len(block) for block in made] == [min(size, 53 - i) for i in range(first, 53, size)]
        assert list(chain.from_iterable(made)) == list(whole)[first:]
        assert all(type(b.features["label"]) is type(whole.features["label"]) for b in made)


@pytest.mark.parametrize("path", FILES, indirect=True)
def test_a_large_file_is_mapped_and_has_the_same_rows_and_types(path, tmp_path, monkeypatch):
    whole = files.read(path)
    monkeypatch.setattr(blocks, "LARGE", 1)
    monkeypatch.setattr(blocks, "ROWS", 10)
    folder = tmp_path / "kept"
    mapped = blocks.read(path, folder)
    assert list(mapped) == list(whole) and mapped.features == whole.features
    (kept,) = folder.iterdir()
    assert mapped.cache_files == [{"filename": str(kept)}]
    monkeypatch.setattr(blocks, "_write", None)  # not again
    assert list(blocks.read(path, folder)) == list(whole)
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "LARGE", 1)
    data = kept.read_bytes()
    kept.write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    assert list(blocks.read(path, folder)) == list(whole)
    path.write_bytes(path.read_bytes().replace(b"t", b"u"))
    assert blocks.read(path, folder)[0] == files.read(path)[0] != whole[0]


BAD = {
    "no json": ('{"text": "a"}\n\n{"text": "b"\n', "line 3"),
    "two kinds of number": ('{"text": 1}\n{"text": 1.5}\n{"text": 9007199254740993}\n', "line 3"),
    "half": ('{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2"),
}


@pytest.mark.parametrize("what", BAD)
def test_the_errors_of_a_large_file_are_those_of_a_small_one(what, write, tmp_path, monkeypatch):
    path = write("bad.jsonl", BAD[what][0])
    monkeypatch.setattr(blocks, "ROWS", 1)
    with pytest.raises(UserError) as small:
        blocks.read(path, tmp_path / "kept")
    monkeypatch.setattr(blocks, "LARGE", 1)
    with pytest.raises(UserError) as large:
        blocks.read(path, tmp_path / "kept")
    assert str(small.value) == str(large.value) and BAD[what][1] in large.value.where
    assert not list((tmp_path / "kept").iterdir())


def test_no_room_for_what_is_too_large_for_memory_is_said(write, tmp_path, monkeypatch):
    path = write("a.jsonl", '{"text": "a"}\n')
    monkeypatch.setattr(blocks, "LARGE", 1)
    with pytest.raises(UserError, match="can't be kept on disk") as caught:
        blocks.read(path, path / "kept")
    assert "data.cache=FOLDER" in caught.value.hint
    assert blocks.read(path, None)[0] == {"text": "a"}


@pytest.mark.parametrize("pairs", [False, True])
def test_tokens_that_went_to_disk_are_those_made_in_memory(pairs, tmp_path, new_tokenizer, monkeypatch):
    texts = [f"w{i % 40} " * (i % 9) for i in range(3001)]
    common = {"max_length": 7, "scalars": {}}
    second = texts[::-1] if pairs else None
    memory = tokens.tokenize(texts, second, new_tokenizer("bert"), **common)
    monkeypatch.setattr(tokens, "CACHED_FROM", 0)
    monkeypatch.setattr(cache, "SPILL", 1000)
    monkeypatch.setattr(cache, "_keep", None)  # not by way of memory
    for _ in range(2):
        disk = tokens.tokenize(texts, second, new_tokenizer("bert"), **common, cache=tmp_path / "kept")
        assert disk.fingerprint() == memory.fingerprint() and disk.truncated == memory.truncated > 0
        monkeypatch.setattr(tokens._Job, "tokens", None)  # the second time they are read, and believed
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".safetensors"]


def test_token_rows_come_in_blocks(monkeypatch):
    def gathered():
        rows = token_rows.TokenRows(4)
        for i in range(20):
            rows.add(range(i % 7), [i % 3 > 0] * (i % 7), i)
            yield from rows.full()
        yield rows.block()

    whole = cache._joined(gathered())
    monkeypatch.setattr(token_rows, "BLOCK", 5)
    assert len(list(gathered())) > 3
    for name, values in cache._joined(gathered()).items():
        same = values.tolist() == whole[name].tolist()
        assert same or values.view(-1, 4).sum(0).tolist() == whole["counts"].tolist(), name


def test_the_first_rows_validate_where_train_is_streamed(choose, write):
    path = write("set/train.jsonl", FILES["jsonl"][1])
    rows = load_rows(choose(path=path, max_eval_samples=5, max_train_samples=30), offline=True, seed=1, stream=8)
    assert rows.splits["validation"]["text"][:] == [f"t {i}" for i in range(5)]
    assert rows.notes == ["no validation split: the first 5 training rows held out"]
    read = list(chain.from_iterable(rows.stream.blocks(rows.stream.first)))
    assert [row["text"] for row in read] == [f"t {i}" for i in range(5, 35)]
    assert [row[ROW] for row in read] == list(range(5, 35))
    assert rows.splits["train"][ROW][:] == list(range(5, 13)) and rows.where("train", 1) == f"{path}, line 13"


def test_a_streamed_set_of_the_hub(choose, monkeypatch):
    def load_dataset(name, config, streaming):
        assert streaming
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
        rows = [{"text": f"h{i}", "label": i} for i in range(20)]
        split = datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)
        return datasets.IterableDatasetDict({"train": split, "validation": split})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows(choose(name="some", max_eval_samples=3), offline=False, seed=1, stream=8)
    assert len(rows.splits["validation"]) == 3
    assert [row["text"] for block in rows.stream.blocks(5) for row in block] == [f"h{i}" for i in range(5, 20)]


REFUSED = {
    "no number of rows to validate on": ({}, "needs data.max_eval_samples=N"),
    "more rows held out than there are": ({"max_eval_samples": 53}, "no more than 53 rows"),
    "a list": ({"path": "list.json", "max_eval_samples": 1}, "a JSON list can't be read piece by piece"),
    "a hub that may not be reached": ({"path": None, "name": "some", "max_eval_samples": 1}, "offline=true forbids it"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_streamed_is_refused(what, choose, write):
    options, message = REFUSED[what]
    write("list.json", json.dumps(OBJECTS))
    path = write("set.jsonl", FILES["jsonl"][1])
    options = {"path": path, **options}
    if options["path"] == "list.json":
        options["path"] = path.parent / "list.json"
    if options["path"] is None:
        del options["path"]
    with pytest.raises(UserError, match=message):
        load_rows(choose(**options), offline=True, seed=1, stream=8)
