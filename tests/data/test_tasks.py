"""Tasks find their columns and labels, name the row that does not fit, and sum their loss in float32."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F

from dora_cli.data import tokens
from dora_cli.data.sources import load_rows
from dora_cli.data.tasks import build_task, higher_is_better
from dora_cli.errors import UserError

LABEL_TASKS = ["classification", "regression"]


@pytest.fixture
def fit(choose, write):
    """Write rows as jsonl splits, and fit the task to them; gives the task and the rows."""

    def fit(train, validation=None, **options):
        for name, rows in {"train": train, "validation": validation or train}.items():
            write(f"set/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        path = write("set/README", "").parent
        config = choose(path=path, **options)
        rows = load_rows(config, offline=True, seed=1)
        task = build_task(config)
        task.fit(rows)
        return task, rows

    return fit


@pytest.fixture
def fit_hub(choose, monkeypatch):
    """The same for a set on the hub, with its column types."""

    def fit(columns, features=None, **options):
        made = datasets.Dataset.from_dict(columns, features=features)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_: datasets.DatasetDict({"train": made, "validation": made})
        )
        config = choose(name="hub/set", **options)
        rows = load_rows(config, offline=True, seed=1)
        task = build_task(config)
        task.fit(rows)
        return task, rows

    return fit


def rows_of(labels, **columns):
    return [{"text": f"w{i}", "label": label, **columns} for i, label in enumerate(labels)]


def encoded_labels(task, rows, tokenizer, role="train"):
    return task.encode(rows.splits[role], tokenizer).scalars["labels"].tolist()


# ---- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "labels", "indices"),
    [
        ([0, 1, 1, 0], ["0", "1"], [0, 1, 1, 0]),
        ([3, 1, 10, 1], ["1", "3", "10"], [1, 0, 2, 0]),
        ([-1, 1, 1], ["-1", "1"], [0, 1, 1]),
        (["pos", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        (["10", "9", "10"], ["9", "10"], [1, 0, 1]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
        ([1.0, 0.0, 1.0], ["0", "1"], [1, 0, 1]),
        ([1, "one", 1], ["1", "one"], [0, 1, 0]),
    ],
)
def test_labels_are_read_from_the_data(fit, tokenizer, given, labels, indices):
    task, rows = fit(rows_of(given))
    assert task.labels == labels and task.num_labels == len(labels)
    assert encoded_labels(task, rows, tokenizer) == indices
    assert task.decode(torch.tensor(indices)) == [labels[i] for i in indices]


@pytest.mark.parametrize(
    ("given", "labels", "indices"),
    [
        (["b", "a"], ["b", "a", "c"], [0, 1]),
        ([0, 1], ["negative", "positive"], [0, 1]),  # GLUE's files give positions
        (["1", "0"], ["negative", "positive"], [1, 0]),  # as csv has them
        ([2, 1], ["1", "2"], [1, 0]),
        ([True, False], ["True", "False"], [0, 1]),  # what YAML makes of `labels: [true, false]`
        ([True, False], ["true", "false"], [0, 1]),
    ],
)
def test_listed_labels_give_order_and_number(fit, tokenizer, given, labels, indices):
    task, rows = fit(rows_of(given), labels=labels)
    assert task.labels == labels
    assert encoded_labels(task, rows, tokenizer) == indices


CLASSES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "maybe"])}
)


def test_class_names_of_the_hub_are_the_labels_in_their_order(fit_hub, tokenizer):
    task, rows = fit_hub({"text": ["w1", "w2"], "label": [1, 0]}, CLASSES)
    assert task.labels == ["no", "yes", "maybe"]
    assert encoded_labels(task, rows, tokenizer) == [1, 0]


@pytest.mark.parametrize("labels", [["no", "yes", "maybe"], ["0", "1", "2"]])
def test_a_model_of_files_and_one_of_the_hub_understand_each_others_labels(fit_hub, tokenizer, labels):
    task, rows = fit_hub({"text": ["w1", "w2"], "label": [2, 0]}, CLASSES, labels=labels)
    assert encoded_labels(task, rows, tokenizer) == [2, 0]


def test_a_hub_test_split_without_labels_is_explained(fit_hub):
    with pytest.raises(UserError, match="label '-1' is none of the labels") as caught:
        fit_hub({"text": ["w1", "w2"], "label": [1, -1]}, CLASSES)
    assert "row 2 of 'train' in hub/set" in caught.value.where
    assert "GLUE's test splits" in caught.value.hint


@pytest.mark.parametrize(
    ("train", "validation", "options", "message", "place"),
    [
        ([0, 1], [1, 0, 2], {}, r"label '2' is none of the labels \(0, 1\)", "validation.jsonl, line 3"),
        (["a", "b"], ["a", "c"], {}, r"label 'c' is none of the labels \(a, b\)", "validation.jsonl, line 2"),
        ([0, 1, 7], None, {"labels": ["no", "yes"]}, "label '7' is none", "train.jsonl, line 3"),
        ([2, 1, 0], None, {"labels": ["1", "2"]}, "label '0' is none", "train.jsonl, line 3"),
        ([0, None, 1], None, {}, "'label' is missing", "train.jsonl, line 2"),
        (["a", "", "b"], None, {}, "'label' is missing", "train.jsonl, line 2"),
        ([0, 1, 1.5], None, {}, "label 1.5 is no whole number", "train.jsonl, line 3"),
        ([0, 1, float("nan")], None, {}, "label nan is no whole number", "train.jsonl, line 3"),
        ([1, 1], None, {}, "every row has the same label '1'", "train"),
        ([0, 1], None, {"labels": ["a", "a"]}, "a label occurs twice", ""),
        ([0, 1], None, {"labels": ["a"]}, "at least two", ""),
        (list(range(150)), None, {}, "150 different values in 150 rows: that is no label", "train"),
        ([[1], [0]], None, {}, r"'label' is no word or number \(list\)", "train.jsonl, line 1"),
    ],
)
def test_a_label_that_does_not_fit_is_named_with_file_and_line(fit, train, validation, options, message, place):
    with pytest.raises(UserError, match=message) as caught:
        fit(rows_of(train), validation and rows_of(validation), **options)
    assert place in (caught.value.where or "")


# ---- columns and texts ---------------------------------------------------------------------------------------------


def test_columns_are_found_by_role_or_by_name(fit, tokenizer):
    rows = [{"a": "w1", "b": "w2", "y": 1, "idx": 7}, {"a": "w3", "b": "w4", "y": 0, "idx": 9}]
    task, made = fit(rows, columns={"text": "a", "text_pair": "b", "label": "y"})
    encoded = task.encode(made.splits["train"], tokenizer)
    assert encoded[0]["input_ids"].tolist() == [2, 6, 3, 7, 3]
    assert encoded.ids == [7, 9]


def test_a_pair_is_taken_where_there_is_one(fit, tokenizer):
    task, made = fit(rows_of([0, 1], text_pair="w9"))
    assert task.encode(made.splits["train"], tokenizer)[0]["input_ids"].tolist() == [2, 5, 3, 14, 3]
    task, made = fit(rows_of([0, 1]))
    assert task.encode(made.splits["train"], tokenizer)[0]["input_ids"].tolist() == [2, 5, 3]


@pytest.mark.parametrize("nothing", ["", None])
def test_a_role_can_be_given_up(fit, tokenizer, nothing):
    columns = {"text_pair": nothing, "id": nothing}
    task, made = fit(rows_of([0, 1], text_pair="w9", id="x"), columns=columns)
    encoded = task.encode(made.splits["train"], tokenizer)
    assert encoded[0]["input_ids"].tolist() == [2, 5, 3] and encoded.ids == [0, 1]


def test_rows_without_id_are_named_by_their_number_in_the_file(fit, choose, write, tokenizer):
    task, made = fit(rows_of([0, 1, 0, 1]), max_train_samples=2)
    numbers = task.encode(made.splits["train"], tokenizer).ids
    assert [row["text"] for row in made.splits["train"]] == [f"w{i}" for i in numbers]
    assert task.encode(made.splits["validation"], tokenizer).ids == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("columns", "message", "hint"),
    [
        ({"text": "sentense"}, "no column 'sentense' for data.columns.text", "data.columns.text=NAME"),
        ({"label": "gold"}, "no column 'gold' for data.columns.label", "data.columns.label=NAME"),
        ({"text_pair": "second"}, "no column 'second'", "data.columns.text_pair=null"),
        ({"txt": "text"}, r"unknown key 'data\.columns\.txt'", "did you mean 'text'"),
    ],
)
def test_a_missing_column_is_named_beside_those_there_are(fit, columns, message, hint):
    with pytest.raises(UserError, match=message) as caught:
        fit(rows_of([0, 1]), columns=columns)
    assert hint in caught.value.hint
    if "unknown" not in message:
        assert "train.jsonl has: text, label" in caught.value.where


def test_a_column_that_only_one_split_lacks_is_named_with_its_file(fit):
    with pytest.raises(UserError, match="no column 'label'") as caught:
        fit(rows_of([0, 1]), [{"text": "w1", "other": 1}])
    assert "validation.jsonl has: text, other" in caught.value.where


@pytest.mark.parametrize(
    ("text", "message"), [(None, "'text' is missing"), (3, "'text' is no text"), (["a"], "is no text")]
)
@pytest.mark.parametrize("task", LABEL_TASKS)
def test_a_row_without_text_is_named_with_file_and_line(fit, task, text, message):
    rows = rows_of([0, 1, 0])
    rows[1]["text"] = text
    with pytest.raises(UserError, match=message) as caught:
        fit(rows_of([0, 1]), rows, task=task)
    assert "validation.jsonl, line 2" in caught.value.where


def test_an_unknown_task_names_the_ones_there_are(choose):
    with pytest.raises(UserError, match=r"unknown data\.task 'clasification'") as caught:
        build_task(choose(task="clasification"))
    assert "did you mean 'classification'" in caught.value.hint


def test_a_number_is_no_position_where_the_data_gave_the_labels(fit):
    with pytest.raises(UserError, match="label '0' is none of the labels") as caught:
        fit(rows_of(["pos", "neg"]), rows_of(["pos", "0"]))
    assert "validation.jsonl, line 2" in caught.value.where


def test_labels_of_thousands_of_digits_are_words(fit):
    long = "9" * 5000
    assert fit(rows_of(["a", long, "7"]))[0].labels == ["7", long, "a"]


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[0.5, 2, 5.0], ["0.5", "2", "5e0"]])
def test_numbers_are_read_also_from_text(fit, tokenizer, given):
    task, rows = fit(rows_of(given), task="regression")
    assert encoded_labels(task, rows, tokenizer) == [0.5, 2.0, 5.0]
    assert task.model_kwargs() == {"num_labels": 1, "problem_type": "regression"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "'label' is missing"),
        ("", "'label' is missing"),
        ("much", "'much' is no finite number"),
        ("nan", "'nan' is no finite number"),
        (float("inf"), "'inf' is no finite number"),
        (True, "'True' is no finite number"),
        (1e39, "no finite number of 32 bits"),
    ],
)
def test_a_row_without_number_is_named_with_file_and_line(fit, bad, message):
    with pytest.raises(UserError, match=message) as caught:
        fit(rows_of([1.0, bad]), task="regression")
    assert "train.jsonl, line 2" in caught.value.where


def test_labels_mean_nothing_to_regression(choose):
    with pytest.raises(UserError, match="no meaning"):
        build_task(choose(task="regression", labels=["a", "b"]))


# ---- loss and predictions ------------------------------------------------------------------------------------------


class Fixed:
    """A model that says what it is told, and checks what it is given."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, attention_mask, token_type_ids=None):
        return SimpleNamespace(logits=self.logits)


def batch(task, rows, tokenizer):
    encoded = task.encode(rows.splits["train"], tokenizer)
    return encoded.batch(range(len(encoded)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_summed_over_rows_in_float32(fit, tokenizer, dtype):
    task, rows = fit(rows_of([2, 0, 1]))
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    total, n, outputs = task.loss(Fixed(logits), batch(task, rows, tokenizer))
    assert n == task.count(batch(task, rows, tokenizer)) == 3 and total.dtype == torch.float32
    expected = -logits.double().log_softmax(-1)[range(3), [2, 0, 1]].sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)  # a float32 sum of three terms
    assert task.predict(outputs).tolist() == logits.argmax(-1).tolist()


def test_squared_error_is_summed_over_rows_in_float32(fit, tokenizer):
    task, rows = fit(rows_of([1.0, 2.0, 4.0]), task="regression")
    total, n, outputs = task.loss(Fixed(torch.tensor([[1.5], [2.0], [1.0]])), batch(task, rows, tokenizer))
    assert (total.item(), n) == (9.25, 3)
    assert task.decode(task.predict(outputs)) == [1.5, 2.0, 1.0]
    assert task.decode(task.reference(batch(task, rows, tokenizer))) == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("task_name", LABEL_TASKS)
def test_tokens_are_kept_in_the_folder_that_the_configuration_names(fit, tokenizer, tmp_path, monkeypatch, task_name):
    monkeypatch.setattr(tokens, "CACHED_FROM", 0)
    task, rows = fit(rows_of([0, 1, 1, 0, 1]), task=task_name, cache=str(tmp_path / "kept"))
    first, second = (task.encode(rows.splits["train"], tokenizer) for _ in range(2))
    assert len(list((tmp_path / "kept" / "tokens").iterdir())) == 1
    assert first.ids == second.ids == [0, 1, 2, 3, 4]
    assert all(
        torch.equal(a, b) for a, b in zip(first.batch([4, 1]).values(), second.batch([4, 1]).values(), strict=True)
    )


@pytest.mark.parametrize("task_name", LABEL_TASKS)
def test_gradients_of_micro_batches_add_up_to_those_of_the_whole(fit, tokenizer, task_name):
    task, rows = fit(rows_of([0, 1, 1, 0, 1]), task=task_name)
    encoded = task.encode(rows.splits["train"], tokenizer)
    weight = torch.randn(60, task.num_labels, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def model(input_ids, attention_mask, token_type_ids):
        return SimpleNamespace(logits=F.embedding(input_ids, weight)[:, 1])

    def gradient(parts):
        count = sum(len(part) for part in parts)
        for part in parts:
            (task.loss(model, encoded.batch(part)).total / count).backward()
        total, weight.grad = weight.grad, None
        return total

    whole = gradient([range(5)])
    parts = gradient([range(3), range(3, 5)])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)  # each row adds to its own entries


@pytest.mark.parametrize(
    ("options", "names", "higher"),
    [
        ({}, ["accuracy"], True),
        ({"task": "regression"}, ["pearson", "spearman"], True),
        ({"metrics": ["loss", "accuracy"]}, ["loss", "accuracy"], False),
        ({"task": "regression", "metrics": ["mse"]}, ["mse"], False),
    ],
)
def test_the_first_metric_chooses(choose, options, names, higher):
    task = build_task(choose(**options))
    assert task.metric_names == names
    assert task.higher_is_better == higher == higher_is_better(names[0])
