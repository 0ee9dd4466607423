"""Exact match and F1 are those of SQuAD's official script, written down here a second time, and of torchmetrics."""

import collections
import random
import re
import string

import numpy as np
import pytest

from dora_cli.evaluation.squad import best_threshold, scores

WORDS = ["the", "The", "a", "an", "Rome", "rome", "U.S.", "ran", "-", "42", "«été»", "an-a", "", "Thé", "dog's"]


def normalize_answer(s: str) -> str:
    """evaluate-v2.0.py, as published."""

    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        return "".join(ch for ch in text if ch not in set(string.punctuation))

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def compute_f1(gold: str, pred: str) -> float:
    gold_toks, pred_toks = (normalize_answer(s).split() if s else [] for s in (gold, pred))
    num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def official(prediction: str, references: list[str]) -> tuple[float, float]:
    gold_answers = [a for a in references if normalize_answer(a)] or [""]
    exact = max(int(normalize_answer(a) == normalize_answer(prediction)) for a in gold_answers)
    return exact, max(compute_f1(a, prediction) for a in gold_answers)


def find_best_thresh(preds: dict, scores: dict, na_probs: dict, qid_to_has_ans: dict) -> tuple[float, float]:
    num_no_ans = sum(1 for k in qid_to_has_ans if not qid_to_has_ans[k])
    cur_score = num_no_ans
    best_score, best_thresh = cur_score, 0.0
    for qid in sorted(na_probs, key=lambda k: na_probs[k]):
        diff = scores[qid] if qid_to_has_ans[qid] else (-1 if preds[qid] else 0)
        cur_score += diff
        if cur_score > best_score:
            best_score, best_thresh = cur_score, na_probs[qid]
    return best_score / len(scores), best_thresh


def cases(n: int) -> list[tuple[str, list[str]]]:
    draw = random.Random(0)

    def text() -> str:
        return draw.choice([" ", "  ", "\t"]).join(draw.choices(WORDS, k=draw.randint(0, 4)))

    made: list[tuple[str, list[str]]] = []
    for _ in range(n):
        references = [text() for _ in range(draw.randint(0, 3))]
        made.append((draw.choice([*references, text(), ""]), references))
    return made


def test_scores_are_the_official_ones() -> None:
    found = [(scores(*case), official(*case)) for case in cases(1500)]
    assert all(got == pytest.approx(wanted, abs=1e-12) for got, wanted in found)
    kinds = collections.Counter((exact, 0 < f1 < 1) for _, (exact, f1) in found)
    assert min(kinds[0, False], kinds[1, False], kinds[0, True]) > 50, "cases of all kinds"


def test_scores_are_those_of_torchmetrics_where_there_are_answers() -> None:
    from torchmetrics.functional.text import squad

    some = [(p, r) for p, r in cases(600) if r and all(normalize_answer(a) for a in r)]
    said = [{"prediction_text": prediction, "id": str(i)} for i, (prediction, _) in enumerate(some)]
    meant = [{"answers": {"text": r, "answer_start": [0] * len(r)}, "id": str(i)} for i, (_, r) in enumerate(some)]
    theirs = squad(said, meant)  # type: ignore[arg-type]
    ours = np.array([scores(*case) for case in some]).mean(0)
    assert ours * 100 == pytest.approx([float(theirs["exact_match"]), float(theirs["f1"])], abs=1e-3)  # float32


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_is_the_official_one(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = int(draw.integers(1, 40))
    has, odds = draw.random(n) < draw.random(), np.round(draw.normal(size=n), seed % 3)  # with and without ties
    values = np.where(has, np.round(draw.random(n), 1), 0.0)
    by_id = [dict(enumerate(column.tolist())) for column in (values, odds, has)]
    wanted = find_best_thresh(dict.fromkeys(range(n), "said"), *by_id)
    assert best_threshold(values, has, odds) == pytest.approx(wanted)
