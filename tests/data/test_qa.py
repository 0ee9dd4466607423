"""Questions from files: columns, the loss of a window, and what is wrong with which line."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_cli.config.schema import DataConfig
from dora_cli.data import tokens
from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import Rows, load_rows
from dora_cli.data.tasks import build_task
from dora_cli.errors import UserError

CONTEXT = " ".join(f"w{i}" for i in range(9))
ROW = {"question": "w3", "context": CONTEXT, "answers": {"text": ["w4 w5"], "answer_start": [12]}}
OF_LENGTHS = [{**ROW, "context": " ".join(f"w{i}" for i in range(n))} for n in (6, 9, 12)]
Make = Callable[..., tuple[Any, Encoded]]


@pytest.fixture
def make(tmp_path: Path, new_tokenizer: Any) -> Make:
    """Write rows, read them as the task does, and encode them."""

    def make(
        *rows: dict[str, Any] | str, kind: str = "bert", side: str = "right", **options: Any
    ) -> tuple[Any, Encoded]:
        file = tmp_path / ("rows.csv" if isinstance(rows[0], str) else "rows.jsonl")
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        config = DataConfig(
            **{"task": "qa", "path": str(file), "max_length": 9, "doc_stride": 2, "cache": None, **options}
        )
        loaded = load_rows(config, offline=True, seed=1, roles=["train"])
        task = build_task(config)
        task.fit(loaded)
        return task, task.encode(loaded.splits["train"], new_tokenizer(kind, padding_side=side))

    return make


def test_a_csv_file_with_columns_of_other_names(make: Make) -> None:
    lines = ["q,text,found,at,key", f"w3,{CONTEXT},w4,12,a", f"w3,{CONTEXT},w5,,b", f"  w3,{CONTEXT},,,c"]
    columns = {"question": "q", "context": "text", "answers": "found", "answer_start": "at", "id": "key"}
    task, encoded = make(*lines, columns=columns, max_length=32)
    assert encoded.ids == ["a", "b", "c"] and encoded.places == [0, 1, 2] and encoded.windows_of == 3
    assert encoded.scalars["start"].tolist() == [7, 8, 0]  # [CLS] w3 [SEP] w0 …
    assert task.null_answers and task.facts() == {"no answer": "1 of train"}
    with pytest.raises(UserError, match="there is no column 'body' for data"):
        make(*lines, columns={**columns, "context": "body"})
    with pytest.raises(UserError, match=r"unknown key 'data\.columns\.contex'"):
        make(*lines, columns={"contex": "text"})


@pytest.mark.parametrize(
    ("row", "options", "problem"),
    [
        ({**ROW, "answers": {"text": ["w4"], "answer_start": [11]}}, {}, "'answers' say 'w4' at character 11 of the"),
        ({**ROW, "answers": "w77"}, {}, "'answers' say 'w77', which is not in the context"),
        ({**ROW, "answers": None}, {}, "'answers' are missing"),
        ({**ROW, "answers": []}, {"null_answers": False}, "'answers' holds no answer, and data.null_answers=false"),
        ({**ROW, "question": " "}, {}, "'question' is empty"),
        ({**ROW, "context": None}, {}, "'context' is missing"),
        ({**ROW, "question": 7}, {}, "'question' is no text"),
        ({**ROW, "question": "w1 " * 5}, {}, "its question has 5 tokens and leaves 1 of data.max_length=9"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(make: Make, row: Any, options: Any, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        make(ROW, ROW, row, **options)
    assert problem in refused.value.message
    assert str(refused.value.where).endswith("rows.jsonl, line 3")
    assert refused.value.hint


def test_the_loss_is_that_of_transformers_whatever_is_padded(make: Make) -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    task, encoded = make(*OF_LENGTHS)
    assert len(encoded) == 2 + 3 + 4
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForQuestionAnswering(BertConfig(vocab_size=60, max_position_embeddings=16, **size)).eval()
    alone = []
    for i in range(len(encoded)):
        window = encoded.batch([i])
        inputs = {name: window[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        alone.append(model(**inputs, start_positions=window["start"], end_positions=window["end"]).loss.item())
        assert task.loss(model, window).total.item() == pytest.approx(alone[-1], rel=1e-5)
    loss = task.loss(model, encoded.batch(range(len(encoded))))
    assert loss.total.item() == pytest.approx(sum(alone), rel=1e-5) and loss.n == len(encoded)


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_move_with_padding(make: Make, side: str) -> None:
    table = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))

    def model(input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(start_logits=table[input_ids][..., 0], end_logits=table[input_ids][..., 1])

    task, encoded = make(*OF_LENGTHS, side=side)
    alone = [float(task.loss(model, encoded.batch([i])).total) for i in range(len(encoded))]
    together = task.loss(model, encoded.batch(range(len(encoded))))
    assert float(together.total) == pytest.approx(sum(alone), rel=1e-5)
    assert together.outputs.isinf().any()


def test_windows_are_kept_for_the_next_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dora_cli.data.tasks import qa

    monkeypatch.setattr(qa, "CACHED_FROM", 1)
    assert tokens.CACHED_FROM > 1
    first = make(ROW, {**ROW, "answers": []}, cache=str(tmp_path / "cache"))[1]
    with monkeypatch.context() as patch:
        patch.setattr(qa, "cut_windows", None)
        again = make(ROW, {**ROW, "answers": []}, cache=str(tmp_path / "cache"))[1]
    assert again.fingerprint() == first.fingerprint() and again.ids == first.ids
    assert next(again.references[0].questions({0: (4, 5)})).text == "w4 w5"
    other = make(ROW, ROW, cache=str(tmp_path / "cache"))[1]
    assert other.fingerprint() != first.fingerprint()
    assert other.scalars["start"].tolist() == [0, 4, 0] * 2  # of windows w0…w4, w3…w7 and w6…w8


def test_a_buffer_of_a_stream_is_the_same_whatever_was_encoded_before(make: Make, new_tokenizer: Any) -> None:
    """Else a resumed run takes it for other data, and every buffer stays in memory."""
    task, encoded = make({**ROW, "id": "a"}, ROW)
    (rows,) = {id(asked): asked.rows for asked in encoded.references}.values()
    task.fit(Rows({"train": rows.remove_columns("id")}))  # rows that come later need not have the same columns
    again = task.encode(rows, new_tokenizer("bert"))
    assert again.fingerprint() == encoded.fingerprint()
    assert next(encoded.references[0].questions({0: (4, 5)})).id == "a"
    alive = weakref.ref(again.references[0])
    del again
    assert alive() is None
