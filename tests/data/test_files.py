"""A file is read as it stands, or one message names the file and the line."""

import contextlib
import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dora_cli.data import files
from dora_cli.errors import UserError

ROWS = [{"text": "one, two", "label": 1}, {"text": 'a "quoted"\nline', "label": 0}, {"text": "ünï ☃", "label": 1}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'text,label\n"one, two",1\n"a ""quoted""\nline",0\nünï ☃,1\n'


def content(path):
    return [{name: row[name] for name in row} for row in files.read(path)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("blank.jsonl", LINES.replace("\n", "\n\n")),
        ("crlf.jsonl", LINES.replace("\n", "\r\n")),
        ("bom.jsonl", "\ufeff" + LINES),
        ("no-end.jsonl", LINES.rstrip("\n")),
        ("lines.json", LINES),
        ("list.json", json.dumps(ROWS)),
        ("odd [1] *?.jsonl", LINES),
        ("ü/☃.jsonl", LINES),
    ],
)
def test_json_in_all_its_shapes_gives_the_same_rows(write, name, text):
    assert content(write(name, text)) == ROWS


@pytest.mark.parametrize("text", [CSV, "\ufeff" + CSV, CSV + "\n\n"])
def test_csv_gives_strings_exactly_as_written(write, text):
    assert content(write("a.csv", text)) == [{**row, "label": str(row["label"])} for row in ROWS]


@pytest.mark.parametrize("value", ["007", "NA", "null", "", "1e5", "True", " x ", "-"])
def test_csv_guesses_no_types_and_no_missing_values(write, value):
    assert content(write("a.csv", f"text,label\n{value},1\n"))[0]["text"] == value


def test_csv_with_crlf_keeps_no_carriage_return(write):
    assert content(write("a.csv", "text,label\r\nx,1\r\n")) == [{"text": "x", "label": "1"}]


def test_tsv_knows_no_quotes(write):
    # GLUE's own tsv files hold unbalanced quotes
    rows = content(write("a.tsv", 'text\tlabel\n"open\t1\nit is "so"\t0\n'))
    assert rows == [{"text": '"open', "label": "1"}, {"text": 'it is "so"', "label": "0"}]


def test_parquet_is_read(write, tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a[0].parquet"))
    assert content(tmp_path / "a[0].parquet") == ROWS


def test_long_texts_are_read(write):
    long = "x" * 300_000  # beyond the csv module's own limit
    assert content(write("a.csv", f"text,label\n{long},1\n"))[0]["text"] == long


GOOD = '{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "text", "message", "place"),
    [
        ("a.jsonl", GOOD + '{"text": "b", "label": \n', "malformed JSON: Expecting value", "line 2"),
        ("a.jsonl", GOOD + "\n" + GOOD + "oops\n", "malformed JSON: Expecting value", "line 4"),
        ("a.jsonl", GOOD + '{"text": "b" "label": 1}\n', "malformed JSON: Expecting ',' delimiter", "line 2"),
        ("a.jsonl", GOOD + "[1, 2]\n", "is no object", "line 2"),
        ("a.jsonl", '"text"\n', '"text" is no object', "line 1"),
        ("a.jsonl", GOOD + '{"text": "b", "text": "c"}\n', "key 'text' occurs twice", "line 2"),
        ("a.jsonl", GOOD + "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "malformed JSON", "line 2"),
        ("a.jsonl", "\n \n", "there are no rows", "a.jsonl"),
        ("a.json", '[{"text": "a"},\n{"text": }]', "malformed JSON: Expecting value", "line 2"),
        ("a.json", '[{"text": "a"}, 3]', "entry 2 is no object", "a.json"),
        ("a.json", "[]", "malformed JSON: there are no rows", "a.json"),
        ("a.json", "null", "null is no object", "line 1"),  # Arrow ends the process over these two
        ("a.jsonl", "null\nnull\n", "null is no object", "line 1"),
        ("a.json", '[{"text": "a"}, null]', "entry 2 is no object", "a.json"),
        ("a.json", "[" * 100_000, "nested too deeply", "a.json"),
        ("a.jsonl", GOOD + '{"text": ' + "[" * 100_000 + "\n", "nested too deeply", "line 2"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', "not UTF-8 text: byte 0xe9 at column 14", "line 2"),
        ("a.csv", "text,label\na,1\nb\n", r"1 field instead of 2 \(text, label\)", "line 3"),
        ("a.csv", 'text,label\n"a\nb",1\nc,d,2\n', "3 fields instead of 2", "line 4"),
        ("a.csv", 'text,label\na,1\n"b,2\nc,3\n', "malformed CSV: unexpected end of data", "line 3"),
        ("a.csv", "text,text\na,1\n", "column 'text' occurs twice", "line 1"),
        ("a.csv", b"text,label\ncaf\xe9,1\n", "not UTF-8 text", "line 2"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "not text: there is a NUL byte", "line 1"),
        ("a.csv", b"text,label\na,1\n\0\0,2\n", "not text: there is a NUL byte", "line 3"),
        ("a.csv", b"\xff\n", "not UTF-8 text: byte 0xff at column 1", "line 1"),
        ("a.csv", "\n\n", "no line of column names", "a.csv"),
        ("a.tsv", "text\tlabel\na\tb\t1\n", "3 fields instead of 2", "line 2"),
        ("a.jsonl", "", "empty", "a.jsonl"),
        ("a.csv", "", "empty", "a.csv"),
        ("a.parquet", "PAR1 not really", "parquet file can't be read", "a.parquet"),
        ("a.txt", "hello", "unknown kind of file '.txt'", ".jsonl, .json, .csv"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(write, name, text, message, place):
    path = write(name, text)
    with pytest.raises(UserError, match=message) as caught:
        files.read(path)
    assert path.name in str(caught.value)
    assert place in str(caught.value)


def test_a_type_that_changes_far_down_leaves_the_values_as_they_are(write):
    # Arrow reads 10 MB at a time and fixes the types of the first block
    text = "".join(json.dumps({"text": "x" * 1000, "label": 1}) + "\n" for _ in range(12_000))
    rows = files.read(write("a.jsonl", text + '{"text": "y", "label": {"no": 1}}\n'))
    assert [rows[i]["label"] for i in (0, 12_000)] == [1, {"no": 1}]


def test_json_values_are_kept_as_they_are(write):
    given = [
        {"text": "2020-01-01", "id": 2**53 + 1, "any": "null", "type": "session", "message": {"a": 1}},
        {"text": "2020-01-02", "id": 1, "any": ["1", 2, None], "type": "user", "message": {"a": "b", "c": []}},
        {"text": "12:30", "id": None, "any": 3.5, "type": "user"},
        {"text": "x", "more": True},
    ]
    for name, text in (("a.jsonl", "\n".join(map(json.dumps, given))), ("a.json", json.dumps(given))):
        rows = list(files.read(write(name, text)))
        assert rows == [{**dict.fromkeys(("text", "id", "any", "type", "message", "more")), **row} for row in given]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}\n{"id": 100000000000000000001}\n', "too large a number"),
        ('{"id": 0.5}\n{"id": 9007199254740993}\n', "too large a number"),
        ('{"id": 1}\n{"id": "\\ud800"}\n', "half a character"),
        ('{"id": 1}\n{"id": ' + "9" * 5000 + "}\n", "malformed JSON: Exceeds the limit"),
        ('{"id": "a"}\n{"id": [100000000000000000001]}\n', "malformed JSON: 'id'"),
        ('{"id": "a"}\n{"id": NaN}\n', "malformed JSON: 'id'"),
    ],
)
def test_json_values_that_cannot_be_kept_are_refused(write, text, message):
    with pytest.raises(UserError, match=message) as caught:
        files.read(write("a.jsonl", text))
    assert "line 2" in caught.value.where


def test_damage_inside_a_parquet_file_is_not_taken_for_a_failing_disk(write):
    import datasets

    path = write("a.parquet", "")
    datasets.Dataset.from_dict({"text": ["a good film"] * 2, "label": ["yes"] * 2}).to_parquet(path)
    whole = path.read_bytes()
    for at in range(4, len(whole), 60):
        path = write(f"{at}.parquet", whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            files.read(path)


def test_a_failing_disk_is_not_blamed_on_the_file(write, monkeypatch):
    import datasets

    def full(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("generating") from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        files.read(write("a.parquet", GOOD))


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", LINES.replace("\n", "\n\n")), ("a.csv", "\n" + CSV), ("a.tsv", "t\n\nx\ny\n")]
)
def test_place_points_at_the_row(write, name, text):
    path = write(name, text)
    lines = text.split("\n")
    marks = {"a.jsonl": ["one", "quoted", "\\u00fc"], "a.csv": ["one", "quoted", "ünï"], "a.tsv": ["x", "y"]}[name]
    for row, mark in enumerate(marks):
        number = int(files.place(path, row).removeprefix("line "))
        assert mark in lines[number - 1]


def test_place_counts_rows_where_there_are_no_lines(write):
    assert files.place(write("a.json", json.dumps(ROWS)), 1) == "row 2"


# Neither a lone surrogate nor NUL is text.
texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_any_text_survives_csv(write, rows):
    import csv
    import io

    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *rows])
    assert [(row["text"], row["label"]) for row in content(write("a.csv", out.getvalue()))] == rows


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json"]))
def test_any_bytes_are_read_or_refused(write, data, name):
    with suppress(UserError):
        for row in files.read(write(name, data)):
            assert isinstance(row, dict)
