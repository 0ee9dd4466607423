"""ROUGE against torchmetrics' own code of it."""

import random

import pytest

from dora_cli.evaluation import ROUGE
from dora_cli.evaluation.summaries import Rouge


def test_rouge_is_that_of_another_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchmetrics.functional.text.rouge as theirs

    # It splits sentences by a model that has to be downloaded; here they stand one a line.
    monkeypatch.setattr(theirs, "_split_sentence", lambda text: text.split("\n"))
    draw = random.Random(0)
    words = ["cats", "cat", "sat", "sitting", "the", "mats", "3rd", "on", "\n", "Ponies", "—", "well-being"]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 14))) for _ in range(60)]
    pairs = [*zip(texts[:30], texts[30:], strict=True), ("", "the cat"), ("cats", ""), ("", ""), ("— !", "cat")]
    expected = [theirs.rouge_score([said], [meant], rouge_keys=ROUGE, use_stemmer=True) for said, meant in pairs]
    means = {name: sum(float(row[f"{name}_fmeasure"]) for row in expected) / len(pairs) for name in ROUGE}
    assert Rouge(ROUGE).mean(pairs) == pytest.approx(means, abs=1e-6)
    assert len({round(value, 3) for value in means.values()}) == 4, "the four differ here"
    assert Rouge(["rougeL"]).mean([]) == {"rougeL": 0.0}


def test_sentences_are_lines() -> None:
    meant, said = "cats sat\ndogs ran", "dogs ran\ncats sat"
    assert Rouge(ROUGE).mean([(said, meant)])["rougeLsum"] == 1.0
    assert Rouge(ROUGE).mean([(said, meant)])["rougeL"] == 0.5
