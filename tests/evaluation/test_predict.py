"""An evaluation says the same in any batch size, keeps the order of the rows, and leaves no trace."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dora_cli.data.encoded import Encoded
from dora_cli.data.tasks import build_task
from dora_cli.evaluation.predict import evaluate

N, WORDS = 23, 30


class Tiny(nn.Module):
    """Mean of the word vectors, with dropout, and a part that is frozen in evaluation mode."""

    def __init__(self, outputs):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5)
        self.head = nn.Linear(8, outputs)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None]
        mean = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.head(self.frozen(self.drop(mean))))


def make(task_name, **options):
    config = {"task": task_name, "columns": {}, "labels": None, "metrics": [], "max_length": 9, **options}
    task = build_task(SimpleNamespace(**config))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (N,), generator=generator)
    tokens = torch.randint(1, WORDS, (int(lengths.sum()),), generator=generator).int()
    if task_name == "classification":
        task.labels = ["no", "yes", "maybe"]
        labels = torch.randint(0, 3, (N,), generator=generator)
    else:
        labels = torch.randn(N, generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    encoded = Encoded(
        {"input_ids": tokens}, offsets, {"labels": labels}, {"input_ids": 0}, ids=[f"r{i}" for i in range(N)]
    )
    torch.manual_seed(0)
    return Tiny(task.num_labels).train(), task, encoded


@pytest.mark.parametrize("task_name", ["classification", "regression"])
@pytest.mark.parametrize("batch_size", [1, 4, N, 100])
def test_any_batch_size_gives_the_numbers_of_one_row_at_a_time(task_name, batch_size):
    model, task, encoded = make(task_name)
    result = evaluate(model, task, encoded, device="cpu", batch_size=batch_size, keep_predictions=True)
    model.eval()
    with torch.no_grad():
        outputs = [task.loss(model, encoded.batch([i])) for i in range(N)]
    assert result.metrics["loss"] == pytest.approx(sum(o.total.item() for o in outputs) / N, rel=1e-5)
    said = [task.decode(task.predict(o.outputs))[0] for o in outputs]
    assert [p["id"] for p in result.predictions] == encoded.ids
    if task_name == "classification":
        assert [p["prediction"] for p in result.predictions] == said
        right = sum(p["prediction"] == p["reference"] for p in result.predictions)
        assert result.metrics["accuracy"] == pytest.approx(right / N, abs=1e-6)
    else:
        assert [p["prediction"] for p in result.predictions] == pytest.approx(said, rel=1e-4, abs=1e-6)
    assert [p["reference"] for p in result.predictions] == task.decode(encoded.scalars["labels"])


def test_only_what_is_asked_for_is_kept():
    model, task, encoded = make("classification", metrics=["f1", "matthews"])
    result = evaluate(model, task, encoded, device="cpu", batch_size=4)
    assert result.predictions is None
    assert list(result.metrics) == ["loss", "f1", "matthews"]
    assert all(type(value) is float for value in result.metrics.values())


def test_it_leaves_no_trace():
    model, task, encoded = make("classification")
    model.frozen.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = torch.get_rng_state()
    first = evaluate(model, task, encoded, device="cpu", batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.drop.training and not model.frozen.training
    assert model.head.weight.grad.eq(1).all()
    assert evaluate(model, task, encoded, device=torch.device("cpu"), batch_size=4) == first


def test_an_interrupted_evaluation_restores_the_mode():
    model, task, encoded = make("classification")
    encoded.ragged["input_ids"][-1] = WORDS + 1  # no such word
    with pytest.raises(IndexError):
        evaluate(model, task, encoded, device="cpu", batch_size=4)
    assert model.training and torch.is_grad_enabled()


def test_autocast_changes_the_arithmetic_but_not_the_type_of_the_loss():
    model, task, encoded = make("classification")
    full = evaluate(model, task, encoded, device="cpu", batch_size=8).metrics["loss"]
    half = evaluate(model, task, encoded, device="cpu", batch_size=8, autocast_dtype=torch.bfloat16).metrics["loss"]
    assert half != full
    assert half == pytest.approx(full, rel=0.02)  # bfloat16 has 8 bits
