"""What an encoder-decoder reads and is to write, and that its loss is transformers' own."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_cli.data.sources import Rows, load_rows
from dora_cli.data.tasks import build_task
from dora_cli.data.tasks.summarization import shifted
from dora_cli.data.token_rows import IGNORED
from dora_cli.errors import UserError

ROWS = [
    {"article": "w1 w2 w3 w4 w5 w6 w7", "highlights": "w1", "id": "a"},
    {"article": "w8", "highlights": "w8\nw9 good w4 w2", "id": "b"},
    {"article": "w3 bad", "highlights": "bad w3", "id": "c"},
]
COLUMNS = {"document": "article", "summary": "highlights"}


def build(folder: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> tuple[Any, Any]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"task": "summarization", "columns": COLUMNS, "labels": None, "metrics": [], "max_length": 16}
    source = {"name": None, "config": None, "path": str(file), "splits": {}, "max_train_samples": None, "cache": None}
    more = {"max_eval_samples": None, "holdout": 0.1, "template": None, "max_target_length": 8}
    choice = SimpleNamespace(**{**config, **source, **more, **options})
    task = build_task(choice)
    loaded = load_rows(choice, offline=True, seed=1, roles=["train"])
    task.fit(loaded)
    return task, loaded.splits["train"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_documents_and_summaries_are_padded_apart_and_on_the_right(tmp_path, new_tokenizer, side) -> None:
    task, rows = build(tmp_path)
    tokenizer = new_tokenizer("bert", model_input_names=["input_ids", "attention_mask"])
    tokenizer.padding_side = side
    encoded = task.encode(rows, tokenizer)
    batch = encoded.batch([0, 1])
    words = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]
    assert words[1] == ["[CLS]", "w8", "[SEP]", *["[PAD]"] * 6] and words[0][-2:] == ["w7", "[SEP]"]
    labels = tokenizer.convert_tokens_to_ids(["[CLS]", "w1", "[SEP]"]) + [IGNORED] * 4
    assert batch["labels"][0].tolist() == labels
    assert batch["attention_mask"].sum(1).tolist() == [9, 3]
    assert batch["decoder_attention_mask"].sum(1).tolist() == [3, 7]
    assert task.count(batch) == 10
    assert encoded.lengths.tolist() == [12, 10, 8]
    assert encoded.references[1] == "w8\nw9 good w4 w2" and list(encoded.ids) == ["a", "b", "c"]
    assert encoded[2]["labels"].tolist() == encoded.target[2]["labels"].tolist()
    largest = encoded.batch(encoded.longest(4))
    assert largest["input_ids"].shape == (4, 9) and largest["labels"].shape == (4, 7)


def test_what_is_cut_is_counted_apart(tmp_path, tokenizer) -> None:
    task, rows = build(tmp_path, max_length=6, max_target_length=4)
    encoded = task.encode(rows, tokenizer)
    assert encoded.truncated == 1
    assert encoded.notes == ["1 summaries were longer than data.max_target_length=4 tokens"]
    assert encoded.target.lengths.tolist() == [3, 4, 4]
    assert encoded.references[1] == ROWS[1]["highlights"], "what a prediction is compared with is whole"


def test_rows_chosen_keep_their_targets_and_other_targets_are_other_data(tmp_path, tokenizer) -> None:
    task, rows = build(tmp_path)
    encoded = task.encode(rows, tokenizer)
    chosen = encoded.select([2, 0])
    assert torch.equal(chosen.batch([0, 1])["labels"], encoded.batch([2, 0])["labels"])
    assert chosen.references == ["bad w3", "w1"]
    other = replace(encoded.target, ragged={"labels": encoded.target.ragged["labels"].flip(0)})
    assert replace(encoded, target=other).fingerprint() != encoded.fingerprint()
    task, rows = build(tmp_path, template="good {article} bad")
    read = tokenizer.convert_ids_to_tokens(task.encode(rows, tokenizer)[1]["input_ids"])
    assert read == ["[CLS]", "good", "w8", "bad", "[SEP]"]


def test_a_template_is_held_against_every_split(tmp_path) -> None:
    task, rows = build(tmp_path, template="{highlights}: {topic}", rows=[{**row, "topic": "one"} for row in ROWS])
    with pytest.raises(UserError, match="topic}', and there is no such column") as refused:
        task.fit(Rows({"train": rows, "validation": rows.remove_columns("topic")}, source="here"))
    assert refused.value.where == "split 'validation' of here has: article, highlights, id"


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_the_loss_is_transformers_own_and_padding_changes_nothing(tmp_path, new_tokenizer, kind) -> None:
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    common = {"vocab_size": 50, "d_model": 16, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3}
    if kind == "bart":
        layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16, "init_std": 0.4}
        model = BartForConditionalGeneration(BartConfig(**common, **layers, **sizes)).eval()
    else:
        model = T5ForConditionalGeneration(T5Config(**common, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()
    task, rows = build(tmp_path)
    encoded = task.encode(rows, new_tokenizer("bert", model_input_names=["input_ids", "attention_mask"]))
    batch = encoded.batch([0, 1, 2])
    assert torch.equal(shifted(batch["labels"], 3, 0), model.prepare_decoder_input_ids_from_labels(batch["labels"]))
    mine, count, outputs = task.loss(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert float(mine / count) == pytest.approx(float(model(**inputs).loss), rel=1e-5)
    alone = [task.loss(model, encoded.batch([i])) for i in range(3)]
    assert float(mine) == pytest.approx(sum(float(part.total) for part in alone), rel=1e-5)
    assert torch.allclose(outputs, torch.cat([part.outputs for part in alone]), atol=1e-4)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"article": " ", "highlights": "w1"}, {}, "'article' is empty"),
        ({"article": "w1", "highlights": ""}, {}, "'highlights' is empty"),
        ({"article": "w1", "highlights": None}, {}, "'highlights' is missing"),
        ({"article": "w1", "highlights": "w1"}, {"columns": {"document": "body"}}, "no column 'body'"),
        ({"article": "w1", "highlights": "w1"}, {"columns": {**COLUMNS, "text": "x"}}, "unknown key"),
        ({"article": "w1", "highlights": "w1"}, {"template": "{documnet}"}, "data.template names '{documnet}'"),
        ({"article": "w1", "highlights": "w1"}, {"labels": ["a", "b"]}, "data.labels has no meaning"),
    ],
)
def test_bad_rows_and_settings_are_refused(tmp_path, row, options, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, [{"article": "w1", "highlights": "w2"}, row], **options)
    if not options:
        assert "rows.jsonl, line 2" in str(caught.value)


def test_a_tokenizer_that_ends_no_text_and_options_of_other_tasks_are_refused(tmp_path, plain_tokenizer) -> None:
    task, rows = build(tmp_path)
    with pytest.raises(UserError, match="no summary could end"):
        task.encode(rows, plain_tokenizer)
    for option in ("max_target_length", "num_beams", "length_penalty"):
        with pytest.raises(UserError, match=f"data.{option} is read by data.task=.*summarization, not by clm"):
            build_task(SimpleNamespace(task="clm", **{option: 0}))
