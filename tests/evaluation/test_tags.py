"""Entities and words are counted as seqeval, the reference for the CoNLL definition, counts them."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from dora_cli.data.tasks.ner import Ner
from dora_cli.data.token_rows import IGNORED
from dora_cli.errors import UserError
from dora_cli.evaluation.scorers import build_scorer
from dora_cli.evaluation.tags import Tagging

MARKS = {"iob": "BI", "bioes": "BIES", "untyped": "BI", "inside only": "I"}


def task_of(labels: list[str], metrics: tuple[str, ...] = ()) -> Any:
    task = Ner(SimpleNamespace(metrics=list(metrics), labels=labels))
    task.labels = labels
    task._choose_metrics()
    return task


def feed(scorer: Any, said: list[list[int]], meant: list[list[int]], tags: int) -> None:
    """In batches of three rows, with tokens between the words that carry no tag, and padding."""
    for at in range(0, len(said), 3):
        rows = list(zip(said[at : at + 3], meant[at : at + 3], strict=True))
        width = 2 * max(len(s) for s, _ in rows) + 2
        logits, labels = torch.randn(len(rows), width, tags), torch.full((len(rows), width), IGNORED)
        for i, (s, m) in enumerate(rows):
            places = torch.arange(1, 2 * len(s), 2)
            logits[i, places, torch.tensor(s)] = 20.0
            labels[i, places] = torch.tensor(m)
        scorer.update(None, logits, {"labels": labels})


@pytest.mark.parametrize("scheme", MARKS)
def test_any_tags_are_scored_as_by_seqeval(scheme: str) -> None:
    """Of random tags most break the rules of every scheme; some rows are predicted almost right."""
    draw, kinds = random.Random(scheme), ([""] if scheme == "untyped" else ["-PER", "-LOC", "-A-B"])
    labels = ["O", *(mark + kind for kind in kinds for mark in MARKS[scheme])]
    meant = [draw.choices(range(len(labels)), k=draw.randint(1, 12)) for _ in range(200)]
    said = [[tag if draw.random() < 0.8 else draw.randrange(len(labels)) for tag in row] for row in meant]
    scorer = build_scorer(task_of(labels), keep=True)
    feed(scorer, said, meant, len(labels))
    as_words = [[[labels[tag] for tag in row] for row in rows] for rows in (meant, said)]
    reference = {"f1": f1_score, "precision": precision_score, "recall": recall_score, "accuracy": accuracy_score}
    assert scorer.metrics() == pytest.approx({name: score(*as_words) for name, score in reference.items()}, abs=1e-12)
    rows = scorer.predictions()
    assert [row["reference"] for row in rows] == as_words[0]
    assert [row["prediction"] for row in rows] == as_words[1]


def test_whole_and_last_words_may_be_written_in_two_ways() -> None:
    rows = [["S-A", "B-A", "I-A", "E-A", "O", "S-B", "E-B"], ["I-A", "I-B", "S-B", "B-B"]]
    bilou = [[tag.replace("S-", "U-").replace("E-", "L-") for tag in row] for row in rows]
    spans = []
    for written in (rows, bilou):
        labels = sorted({tag for row in written for tag in row})
        tags = torch.tensor([labels.index(tag) for row in written for tag in row]).numpy()
        first = torch.zeros(len(tags), dtype=torch.bool)
        first[[0, 7]] = True
        spans.append(Tagging(labels).spans(tags, first.numpy()).tolist())
    assert spans[0] == spans[1]
    assert len(spans[0]) == sum(len(get_entities(row)) for row in rows) == 8


def test_without_entities_there_is_only_the_accuracy_and_nothing_is_divided_by_zero() -> None:
    scorer = build_scorer(task_of(["NOUN", "VERB"]))
    feed(scorer, [[0, 1], [1]], [[0, 0], [1]], 2)
    assert scorer.metrics() == {"accuracy": 2 / 3}
    none = build_scorer(task_of(["O", "B-X"]))
    feed(none, [[0, 0]], [[0, 0]], 2)
    assert none.metrics() == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
    with pytest.raises(UserError, match="'f1' counts entities, and these tags mark none: NOUN, VERB"):
        task_of(["NOUN", "VERB"], ("accuracy", "f1"))
    with pytest.raises(UserError, match="'matthews' is no metric"):
        build_scorer(task_of(["O", "B-X"], ("matthews",)))
