"""From start and end logits of windows to one answer a row, and what it is worth."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_cli.data.tasks.qa import padding_before
from dora_cli.evaluation import SPANS
from dora_cli.evaluation.scorers import measured
from dora_cli.evaluation.squad import best_threshold, scores


class _Verdict(NamedTuple):
    """A row, what it was answered, and what that is worth; ``best``: the same of the answer that is not none."""

    row: dict[str, Any]
    answerable: bool
    odds: float
    given: tuple[float, float]  # exact, f1
    best: tuple[float, float]


class SpanScorer:
    """Answers that stand in a context. Of every window four numbers are kept, never its logits.

    A window's answer is the span of at most ``task.max_answer_length`` context tokens with the largest sum of start and
    end logit, of all such spans; a row's is the best of its windows'. The score of no answer is that sum at the null
    position, the smallest of the row's windows; where ``task.null_answers``, it is the answer where it is larger.
    """

    taken: ClassVar[tuple[str, ...]] = ("values", "places")
    writes = False

    def __init__(self, task: Any, keep: bool) -> None:
        self.task = task
        self.names = measured(task, SPANS)
        self.values: list[Tensor] = []  # (n, 2) of every batch: score of the answer, score of none
        self.places: list[Tensor] = []  # (n, 3): row, first and last token in its context
        self.asked: Any = None  # the split's rows

    def update(self, model: Any, outputs: Tensor, batch: dict[str, Tensor], references: Sequence[Any] = ()) -> None:
        self.asked = references[0]
        before = padding_before(batch)
        score, start, end = best_spans(outputs, batch["first"] + before, batch["size"], self.task.max_answer_length)
        null = outputs.gather(1, (batch["null"] + before)[:, None, None].expand(-1, 1, 2)).sum((1, 2))
        self.values.append(torch.stack([score, null], dim=1))
        self.places.append(torch.stack([batch["row"], batch["skipped"] + start, batch["skipped"] + end], dim=1))

    def metrics(self) -> dict[str, float]:
        has = np.array([v.answerable for v in self._verdicts])
        odds = np.array([v.odds for v in self._verdicts])
        found: dict[str, float] = {}
        for i, name in enumerate(("exact", "f1")):
            given, best = (np.array([getattr(v, kind)[i] for v in self._verdicts]) for kind in ("given", "best"))
            found |= {name: _mean(given), f"HasAns_{name}": _mean(given[has]), f"NoAns_{name}": _mean(given[~has])}
            found[f"best_{name}"], found[f"best_{name}_thresh"] = best_threshold(best, has, odds)
        asked = [n for name in self.names for n in ((name, f"{name}_thresh") if name.startswith("best_") else (name,))]
        return {name: found[name] for name in asked}

    def predictions(self) -> list[dict[str, Any]]:
        return [verdict.row for verdict in self._verdicts]

    @cached_property
    def _verdicts(self) -> list[_Verdict]:
        values, places = torch.cat(self.values).cpu().numpy(), torch.cat(self.places).cpu().numpy()
        # By row, the best window first; of equal ones the one whose answer stands first, in any order of the batches.
        order = np.lexsort((places[:, 1], -values[:, 0], places[:, 0]))
        values, places = values[order], places[order]
        _, firsts = np.unique(places[:, 0], return_index=True)
        nulls = np.minimum.reduceat(values[:, 1], firsts)
        spans = {row: (first, last) for row, first, last in places[firsts].tolist()}
        verdicts = []
        for question, score, null in zip(
            self.asked.questions(spans), values[firsts, 0].tolist(), nulls.tolist(), strict=True
        ):
            said = "" if self.task.null_answers and null > score else question.text
            exact, f1 = given = scores(said, question.references)
            row = {
                "id": question.id,
                "prediction": said,
                "reference": question.references,
                "exact": exact,
                "f1": f1,
                "score": _number(score),
                "null_score": _number(null),
                "span": list(question.span),  # of the answer that is not none
            }
            best = given if said else scores(question.text, question.references)
            verdicts.append(_Verdict(row, bool(question.references), null - score, given, best))
        return verdicts


def best_spans(logits: Tensor, first: Tensor, size: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best answer of every window, of all spans of its context tokens that are no longer than ``limit``.

    Args:
        logits: of start and end, shape ``(n, s, 2)``.
        first: position of the first context token, shape ``(n,)``.
        size: how many context tokens there are, shape ``(n,)``.
        limit: tokens of an answer at most.

    Returns:
        Start logit + end logit of the best span, its first and its last token counted from ``first``; ``(n,)`` each.
    """
    place = torch.arange(logits.shape[1], device=logits.device)
    inside = (place >= first[:, None]) & (place < (first + size)[:, None])
    starts, ends = logits.masked_fill(~inside[..., None], -torch.inf).unbind(-1)  # (n, s) each
    limit = min(limit, logits.shape[1])
    reach = F.pad(ends, (0, limit - 1), value=-torch.inf).unfold(1, limit, 1)  # (n, s, limit): the ends for each start
    best, length = reach.max(dim=-1)
    score, start = (starts + best).max(dim=-1)
    return score, start - first, start - first + length.gather(1, start[:, None])[:, 0]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
