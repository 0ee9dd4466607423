"""Every choice with its question, in batches of any numbers of choices; and what is refused."""

from functools import partial
from typing import Any

import pytest
import torch

from dora_cli.data.choices import EncodedChoices
from dora_cli.data.sources import Rows
from dora_cli.errors import UserError
from dora_cli.evaluation.predict import evaluate

QUESTIONS = [
    {"text": "w1 w2", "choices": ["w3", "w4 w5", "good"], "label": 1},
    {"text": "w6", "choices": ["bad", "w7 w8 w9"], "label": 0},
    {"text": "w1 w2 w3 w4", "choices": ["w5", "w6", "w7", "w8"], "label": 3},
]


@pytest.fixture
def build(fitted: Any) -> Any:
    """The task fitted to such rows, and the rows."""
    return partial(fitted, "multiple_choice", max_length=16)


def texts(encoded: Any, tokenizer: Any, row: int = 0) -> list[str]:
    ids = encoded[row]["input_ids"]
    return [" ".join(tokenizer.convert_ids_to_tokens(ids[part].tolist())) for part in encoded.parts(row)]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import BertConfig, BertForMultipleChoice

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForMultipleChoice(BertConfig(vocab_size=47, initializer_range=0.5, **shape)).eval()


def test_every_choice_is_read_with_its_question(tokenizer: Any, build: Any) -> None:
    task, rows = build(QUESTIONS)
    encoded = task.encode(rows, tokenizer)
    assert texts(encoded, tokenizer) == [
        "[CLS] w1 w2 [SEP] w3 [SEP]",
        "[CLS] w1 w2 [SEP] w4 w5 [SEP]",
        "[CLS] w1 w2 [SEP] good [SEP]",
    ]
    assert (len(encoded), encoded.lengths.tolist(), encoded.ids) == (3, [21, 14, 32], [0, 1, 2])
    assert (task.num_labels, encoded.scalars["labels"].tolist()) == (4, [1, 0, 3])
    begun = [{**row, "text_pair": "w9"} for row in QUESTIONS[:1]]
    task, rows = build(begun)
    assert texts(task.encode(rows, tokenizer), tokenizer)[0] == "[CLS] w1 w2 [SEP] w9 w3 [SEP]"


def test_a_batch_of_questions_is_a_batch_of_all_their_choices(tokenizer: Any, build: Any) -> None:
    task, rows = build(QUESTIONS)
    encoded = task.encode(rows, tokenizer)
    for chosen in (encoded.batch([2, 1]), encoded.select([0, 2, 1]).batch([1, 2])):
        reference = tokenizer(
            ["w1 w2 w3 w4"] * 4 + ["w6"] * 4,
            ["w5", "w6", "w7", "w8", "bad", "w7 w8 w9", "w7 w8 w9", "w7 w8 w9"],
            padding=True,
            return_tensors="pt",
        )
        assert all(torch.equal(chosen[name], reference[name]) for name in reference)
        assert chosen["labels"].tolist() == [3, 0] and chosen["choices"].tolist() == [4, 2]
    assert isinstance(encoded.select([1]), EncodedChoices) and encoded.select([1]).lengths.tolist() == [14]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_is_that_of_each_question_alone(tokenizer: Any, model: Any, side: str, build: Any) -> None:
    tokenizer.padding_side = side
    task, rows = build(QUESTIONS)
    encoded = task.encode(rows, tokenizer)
    found = task.loss(model, encoded.batch([0, 1, 2]))
    alone = 0.0
    for i, question in enumerate(QUESTIONS):
        pairs = tokenizer([question["text"]] * len(question["choices"]), question["choices"], padding=True)
        inputs = {name: torch.tensor(values)[None] for name, values in pairs.items()}
        if side == "right":  # with left padding BERT's positions begin at the padding, so lengths count
            output = model(**inputs, labels=torch.tensor([question["label"]]))
            alone += output.loss.item()
            torch.testing.assert_close(found.outputs[i, : len(question["choices"])], output.logits[0])
        assert found.outputs[i].isfinite().sum() == len(question["choices"])
    assert found.n == task.count(encoded.batch([0, 1, 2])) == 3
    if side == "right":
        assert found.total.item() == pytest.approx(alone, rel=1e-5)
        result = evaluate(model, task, encoded, device="cpu", batch_size=2, keep_predictions=True)
        assert result.metrics["loss"] == pytest.approx(alone / 3, rel=1e-5)
        assert result.predictions is not None
        assert [row["reference"] for row in result.predictions] == [1, 0, 3]
        right = sum(row["prediction"] == row["reference"] for row in result.predictions)
        assert result.metrics["accuracy"] == pytest.approx(right / 3, abs=1e-6)
    found.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("row", "options", "right"),
    [
        ({"label": "B"}, {}, 1),
        ({"label": "2"}, {}, 2),
        ({"label": 2.0}, {}, 2),
        ({"label": "good"}, {}, 2),
        ({"label": "b"}, {"labels": ["a", "b", "c"]}, 1),
        ({"label": 2}, {"labels": ["a", "b", "c"]}, 2),
        ({"label": "2"}, {"labels": ["1", "2", "3"]}, 1),
        ({"label": True}, {"labels": ["true", "false", "neither"]}, 0),
        ({"choices": {"text": ["w3", "w4"], "label": ["1", "2"]}, "answerKey": "2"}, {}, 1),
        ({"choices": [{"text": "w3", "label": "C"}, {"text": "w4", "label": "D"}], "answerKey": "D"}, {}, 1),
        ({"a": "w3", "b": "w4", "c": "", "label": "1"}, {"columns": {"choices": "a, b,c"}}, 1),
    ],
)
def test_choices_and_labels_may_be_written_in_the_ways_that_people_have(
    row: Any, options: Any, right: int, tokenizer: Any, build: Any
) -> None:
    whole = {"text": "w1", **({"choices": ["w3", "w4", "good"]} if "a" not in row else {}), **row}
    task, rows = build([whole], **options)
    encoded = task.encode(rows, tokenizer)
    assert encoded.scalars["labels"].tolist() == [right]
    assert texts(encoded, tokenizer)[0] == "[CLS] w1 [SEP] w3 [SEP]"
    assert len(encoded.parts(0)) == (2 if "a" in row or "answerKey" in row else 3)
    assert task.decode(encoded.scalars["labels"]) == ([options["labels"][right]] if "labels" in options else [right])


def test_the_text_loses_its_end_and_a_choice_never_does(tokenizer: Any, build: Any) -> None:
    rows_in = [{"text": "w1 w2 w3 w4 w5", "choices": ["w6 w7 w8", "w9"], "label": 0}]
    task, rows = build(rows_in, max_length=7)
    encoded = task.encode(rows, tokenizer)
    assert texts(encoded, tokenizer) == ["[CLS] w1 [SEP] w6 w7 w8 [SEP]", "[CLS] w1 w2 w3 [SEP] w9 [SEP]"]
    assert encoded.notes == [
        "2 of 2 choices and their text were longer than data.max_length=7 tokens: the text lost its end"
    ]
    task, rows = build([QUESTIONS[0], *rows_in], max_length=5)
    with pytest.raises(UserError, match="choice 1 of a row is longer than") as caught:
        task.encode(rows, tokenizer)
    assert caught.value.where.endswith("rows.jsonl, line 2")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"choices": "w1, w2"}, {}, "'choices' must hold a list of two texts or more"),
        ({"choices": ["w1"]}, {}, "'choices' must hold a list of two"),
        ({"choices": ["w1", None]}, {}, "'choices': choice 2 is missing"),
        ({"choices": ["w1", 7]}, {}, "'choices': choice 2 is no text"),
        ({"label": 3}, {}, "label '3' of 'label' is none of the 3 choices .0 to 2"),
        ({"label": 3}, {}, "numbers from 1 need data.labels=.1,2,3"),
        ({"label": -1}, {}, "label '-1' of 'label' is none"),
        ({"label": True}, {"labels": ["a", "b", "c"]}, "label 'true' of 'label' is none"),
        ({"label": ""}, {}, "'label' is missing"),
        ({"label": "b", "choices": ["b", "b"]}, {}, "label 'b' of 'label' may stand for several"),
        ({"label": "A", "choices": ["B", "A"]}, {}, "may stand for several choices: name them in data.labels"),
        ({"label": "0"}, {"labels": ["1", "2", "3"]}, "label '0' of 'label' is none of the 3 choices .1, 2, 3"),
        ({"text": None}, {}, "'text' is missing"),
        ({}, {"labels": ["a", "b"]}, "3 choices, and data.labels names 2"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row: Any, options: Any, message: str, build: Any) -> None:
    good = {"text": "w1", "choices": ["w3", "w4"], "label": "1" if options.get("labels") == ["1", "2", "3"] else 1}
    bad = {**good, "choices": ["w3", "w4", "w5"], **row}
    with pytest.raises(UserError, match=message) as caught:
        build([good, bad], **options)
    assert str(caught.value.where).endswith("rows.jsonl, line 2")


def test_what_can_be_known_beforehand_is_refused(build: Any) -> None:
    with pytest.raises(UserError, match="'f1' has no meaning"):
        build(QUESTIONS, metrics=["f1"])
    with pytest.raises(UserError, match=r"no column 'b' for data\.columns\.choices"):
        build(QUESTIONS, columns={"choices": "text, b"})
    with pytest.raises(UserError, match=r"unknown key 'data\.columns\.choises'"):
        build(QUESTIONS, columns={"choises": "choices"})


def test_a_buffer_with_fewer_choices_does_not_limit_those_of_an_evaluation(build: Any) -> None:
    task, rows = build(QUESTIONS)
    task.fit(Rows({"train": rows.select([1])}))
    assert task.num_labels == 4


@pytest.mark.parametrize(("labels", "said"), [([1, 2], True), ([0, 1], False)])
def test_labels_that_seem_to_count_from_one_are_noted(
    labels: list[int], said: bool, tokenizer: Any, build: Any
) -> None:
    rows = [{"text": "w1", "choices": ["w2", "w3", "w4"], "label": labels[i % 2]} for i in range(20)]
    task, split = build(rows)
    notes = task.encode(split, tokenizer).notes
    assert any("labels count from 0" in note for note in notes) == said
