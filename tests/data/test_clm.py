"""Plain text: all of it is learned, long texts in several rows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_cli.data.sources import load_rows
from dora_cli.data.tasks import build_task
from dora_cli.data.token_rows import IGNORED
from dora_cli.errors import UserError


@pytest.fixture
def made() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *"abcdefgh"])}
    rust = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    tokenizer.padding_side = "right"
    return tokenizer


def build(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"task": "clm", "columns": {}, "labels": None, "metrics": [], "max_length": 4, "cache": None}
    source = {"name": None, "config": None, "path": str(file), "splits": {}, "max_train_samples": None}
    choice = SimpleNamespace(
        **{
            **config,
            **source,
            "max_eval_samples": None,
            "holdout": 0.1,
            "template": None,
            "answer": None,
            "max_new_tokens": 8,
            **options,
        }
    )
    loaded = load_rows(choice, offline=True, seed=1, roles=["train"])
    task = build_task(choice)
    task.fit(loaded)
    return task, loaded.splits["train"]


def test_nothing_of_a_long_text_is_lost(made: Any, tmp_path: Path) -> None:
    task, rows = build(tmp_path, [{"body": "a b c d e f", "id": "x"}, {"body": "g h"}], columns={"text": "body"})
    encoded = task.encode(rows, made)
    tokens = [made.convert_ids_to_tokens(encoded[i]["input_ids"].tolist()) for i in range(len(encoded))]
    assert tokens == [["a", "b", "c", "d"], ["d", "e", "f", "</s>"], ["g", "h", "</s>"]]
    labels = [encoded[i]["labels"].tolist() for i in range(3)]
    assert [row[0] for row in labels] == [IGNORED] * 3
    assert [row[1:] for row in labels] == [encoded[i]["input_ids"].tolist()[1:] for i in range(3)]
    assert [encoded.place(i) for i in range(3)] == [0, 0, 1]
    assert encoded.ids == ["x", "x", None]
    assert task.count(encoded.batch([0, 1, 2])) == 6 + 2


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'text' is missing") as caught:
        build(tmp_path, [{"text": "a"}, {"text": None}])
    assert "line 2" in str(caught.value.where)
    with pytest.raises(UserError, match="no column 'words'"):
        build(tmp_path, [{"text": "a"}], columns={"text": "words"})
    with pytest.raises(UserError, match="unknown key"):
        build(tmp_path, [{"text": "a"}], columns={"label": "text"})
    with pytest.raises(UserError, match=r"data\.template is read by data\.task=sft.*, not by clm"):
        build(tmp_path, [{"text": "a"}], template="{text}")


@pytest.mark.parametrize("n", range(1, 12))
def test_every_token_but_the_first_is_learned_once(n: int, made: Any, tmp_path: Path) -> None:
    task, rows = build(tmp_path, [{"text": " ".join("abcdefgh"[i % 8] for i in range(n))}], max_length=3)
    encoded = task.encode(rows, made)
    learned = [label for i in range(len(encoded)) for label in encoded[i]["labels"].tolist() if label != IGNORED]
    assert made.convert_ids_to_tokens(learned) == [*("abcdefgh"[i % 8] for i in range(1, n)), "</s>"]
    assert encoded.notes == []


def test_an_end_that_the_tokenizer_writes_is_not_written_twice(made: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.eos_token_id)]
    )
    task, rows = build(tmp_path, [{"text": "a b"}])
    assert made.convert_ids_to_tokens(task.encode(rows, made)[0]["input_ids"].tolist()) == ["a", "b", "</s>"]
