"""SQuAD's measures by the definition of its official script (evaluate-v2.0.py), as shares: 1 is its 100."""

import re
from collections import Counter
from collections.abc import Sequence
from string import punctuation

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", punctuation)


def words(text: str) -> list[str]:
    """What counts of an answer: lower-case words without punctuation (ASCII's) and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def scores(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of a prediction, each with the reference that suits it best.

    Where there is no reference, or none of which anything counts, only a prediction of which nothing counts is right.

    Args:
        prediction: the answer; empty for none.
        references: all answers that are right; none where there is no answer.
    """
    said = words(prediction)
    meant = [found for found in map(words, references) if found] or [[]]
    return float(said in meant), max(_f1(said, reference) for reference in meant)


def _f1(said: list[str], meant: list[str]) -> float:
    """The harmonic mean of the shares of words that are right and that are found, repeated ones counted."""
    if not said or not meant:
        return float(said == meant)
    same = sum((Counter(said) & Counter(meant)).values())
    return 2 * same / (len(said) + len(meant))


def best_threshold(values: np.ndarray, answerable: np.ndarray, odds: np.ndarray) -> tuple[float, float]:
    """The best mean that answering only below some odds would give, and the largest odds at which that answers.

    Args:
        values: what every row's answer is worth if it is given, shape ``(R,)``. Without an answer, a row that has none
            is worth 1, any other 0.
        answerable: whether the row has an answer, shape ``(R,)``.
        odds: how much speaks for no answer, shape ``(R,)``.

    Returns:
        The mean and the threshold; 0.0 where answering nothing is best.
    """
    order = np.argsort(odds, kind="stable")
    gains = np.where(answerable, values, -1.0)[order].cumsum()
    silent = float((~answerable).sum())
    best = int(gains.argmax())
    if not gains[best] > 0:
        return silent / len(values), 0.0
    return (silent + float(gains[best])) / len(values), float(odds[order[best]])
