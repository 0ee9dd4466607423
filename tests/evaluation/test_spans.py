"""Of all spans the best one, of all windows of a row too, whatever the batches."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_cli.config.schema import DataConfig
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks import build_task
from dora_cli.errors import UserError
from dora_cli.evaluation.predict import evaluate
from dora_cli.evaluation.scorers import build_scorer
from dora_cli.evaluation.spans import best_spans
from dora_cli.evaluation.squad import scores

WORDS = [f"w{i}" for i in range(20)]


def test_the_best_span_is_the_best_of_all() -> None:
    draw = torch.Generator().manual_seed(0)
    for limit in (1, 3, 50):
        logits = torch.randn(30, 12, 2, generator=draw)
        first = torch.randint(0, 6, (30,), generator=draw)
        size = torch.randint(1, 7, (30,), generator=draw)
        score, start, end = best_spans(logits, first, size, limit)
        for i in range(30):
            f, n = int(first[i]), int(size[i])
            spans = [(s, e) for s in range(n) for e in range(s, min(s + limit, n))]
            wanted = max(spans, key=lambda span: float(logits[i, f + span[0], 0] + logits[i, f + span[1], 1]))
            assert (int(start[i]), int(end[i])) == wanted
            assert float(score[i]) == float(logits[i, f + wanted[0], 0] + logits[i, f + wanted[1], 1])


class Words(torch.nn.Module):
    """A token's logits follow from it alone, so that a span has one score in all windows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(40, 2)
        self.table.weight.data[2] = 1.0  # no answer, by its score among the others

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        start, end = self.table(input_ids).unbind(-1)
        return SimpleNamespace(start_logits=start, end_logits=end)


def tokenizer(side: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", "<cls>", *WORDS])}, "<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.post_processor = processors.TemplateProcessing(
        single="<cls> $A", pair="<cls> $A <cls> $B", special_tokens=[("<cls>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, pad_token="<pad>", unk_token="<unk>", cls_token="<cls>", padding_side=side
    )


def rows() -> list[dict[str, Any]]:
    draw, made = random.Random(0), []
    for i in range(24):
        words = draw.choices(WORDS, k=draw.randint(2, 30))
        texts = [" ".join(words[j : j + 2]) for j in (0, len(words) // 2)] if i % 3 else []
        made.append({"id": f"q{i}", "question": "w1 w2", "context": " ".join(words), "answers": texts})
    return made


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("null", [True, False])
def test_a_row_is_answered_by_its_best_window_in_any_batches(side: str, null: bool) -> None:
    """A row's answer, and its metrics, by hand from all spans of the context."""
    from datasets import Dataset

    data = [{**row, ROW: i} for i, row in enumerate(rows())]
    config = DataConfig(
        task="qa", max_length=12, doc_stride=4, max_answer_length=3, null_answers=null or None, cache=None,
        metrics=["f1", "exact", "HasAns_exact", "NoAns_f1", "best_f1"],
    )  # fmt: skip
    task = build_task(config)
    split = Dataset.from_list(data)
    task.fit(Rows({"validation": split}))
    task.null_answers = null
    task.encode(split.select([0]), tokenizer(side))  # another split comes before
    encoded, model = task.encode(split, tokenizer(side)), Words()
    assert len(encoded) > encoded.windows_of == 24
    results = [evaluate(model, task, encoded, device="cpu", batch_size=n, keep_predictions=True) for n in (1, 7, 99)]
    assert results[0].predictions == results[1].predictions == results[2].predictions
    assert [r["id"] for r in results[0].predictions] == [row["id"] for row in data]

    table, worth = model.table.weight.tolist(), []
    for row, said in zip(data, results[0].predictions, strict=True):
        words = row["context"].split()
        ids = [WORDS.index(word) + 3 for word in words]
        score, start, end = max(
            (table[ids[s]][0] + table[ids[e]][1], -s, -e)
            for s in range(len(ids))
            for e in range(s, min(s + 3, len(ids)))
        )
        text = " ".join(words[-start : 1 - end])
        none = sum(table[2])
        assert said["score"] == pytest.approx(score, abs=1e-4) and said["null_score"] == pytest.approx(none, abs=1e-4)
        assert row["context"][slice(*said["span"])] == text
        assert said["prediction"] == ("" if null and none > score else text)
        assert said["reference"] == row["answers"]
        worth.append((said["exact"], said["f1"]))
        assert worth[-1] == scores(said["prediction"], row["answers"])
    metrics = results[0].metrics
    assert metrics["f1"] == pytest.approx(sum(f1 for _, f1 in worth) / 24)
    assert metrics["exact"] == pytest.approx(sum(exact for exact, _ in worth) / 24)
    has = [exact for (exact, _), row in zip(worth, data, strict=True) if row["answers"]]
    assert metrics["HasAns_exact"] == pytest.approx(sum(has) / len(has))
    assert metrics["best_f1"] >= metrics["f1"] and "best_f1_thresh" in metrics
    assert {said["prediction"] == "" for said in results[0].predictions} == ({True, False} if null else {False})


def test_a_metric_of_another_task_is_refused() -> None:
    with pytest.raises(UserError, match="'accuracy' is no metric of data"):
        build_scorer(build_task(DataConfig(task="qa", metrics=["accuracy"])))
