"""Scores of tagged words: entities by the definition of the CoNLL shared tasks, and words."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dora_cli.data.tasks.ner import OUTSIDE, TAG
from dora_cli.data.token_rows import IGNORED
from dora_cli.evaluation import TAGS
from dora_cli.evaluation.scorers import measured


class Tagging:
    """What the tags of a task say of entities, as tables by number of tag.

    An entity is a run of words of one kind, as ``conlleval`` reads them: it begins at a word that is marked as a
    beginning (B, and S or U, which are whole entities), whose neighbour before it is outside, is marked as an end (E or
    L, S or U) or is of another kind. That one rule reads IOB1, IOB2, BIOES and BILOU, and what breaks their rules.

    Args:
        labels: tags in order; where they mark no entities, there are none.
    """

    def __init__(self, labels: list[str]) -> None:
        parts = [(OUTSIDE, "") if label == OUTSIDE else _parts(label) for label in labels]
        kinds = sorted({kind for _, kind in parts})
        self.inside = np.array([mark != OUTSIDE for mark, _ in parts])
        self.begins = np.array([mark in "BSU" for mark, _ in parts])
        self.ends = np.array([mark in "ELSU" for mark, _ in parts])
        self.kind = np.array([kinds.index(kind) for _, kind in parts])

    def spans(self, tags: np.ndarray, first: np.ndarray) -> np.ndarray:
        """A number for every entity: two are equal where first word, last word and kind are.

        Args:
            tags: of all words of some rows, end to end, shape ``(w,)``.
            first: whether a word is its row's first, shape ``(w,)``.
        """
        inside, kind = self.inside[tags], self.kind[tags]
        before = np.roll(tags, 1)
        goes_on = self.inside[before] & ~self.ends[before] & (self.kind[before] == kind) & ~first
        begins = inside & (self.begins[tags] | ~goes_on)
        goes_on = np.append((inside & ~begins)[1:], False)
        starts, stops = np.flatnonzero(begins), np.flatnonzero(inside & ~goes_on)
        return (starts * len(tags) + stops) * (int(self.kind.max()) + 1) + kind[starts]


class TagScorer:
    """A tag for every word: precision, recall and F1 over all entities of all rows, and the accuracy of words.

    An entity is right where its first word, its last word and its kind are. Words that were lost at the end of a long
    row are not scored.
    """

    taken: ClassVar[tuple[str, ...]] = ("right", "words", "matched", "predicted", "expected", "rows")
    writes = False

    def __init__(self, task: Any, keep: bool) -> None:
        self.names = measured(task, TAGS)
        self.task, self.keep = task, keep
        self.tagging = Tagging(task.labels) if task.has_entities else None
        self.right = self.words = self.matched = self.predicted = self.expected = 0
        self.rows: list[tuple[list[int], list[int]]] = []  # what was said of a row's words, and what should have been

    def update(self, model: Any, outputs: Tensor, batch: dict[str, Tensor], references: Sequence[Any] = ()) -> None:
        said, meant = torch.stack([outputs.argmax(-1), batch["labels"]]).cpu().numpy()  # (n, s) each
        real = meant != IGNORED
        lengths = real.sum(1)
        said, meant = said[real], meant[real]
        first = np.zeros(len(meant), bool)
        starts = lengths.cumsum() - lengths
        first[starts] = True
        self.words += len(meant)
        self.right += int((said == meant).sum())
        if self.tagging is not None:
            found, wanted = self.tagging.spans(said, first), self.tagging.spans(meant, first)
            self.predicted += len(found)
            self.expected += len(wanted)
            self.matched += len(np.intersect1d(found, wanted, assume_unique=True))
        if self.keep:
            pieces = (np.split(tags, starts[1:]) for tags in (said, meant))
            self.rows += [(s.tolist(), m.tolist()) for s, m in zip(*pieces, strict=True)]

    def metrics(self) -> dict[str, float]:
        values = {
            "f1": _share(2 * self.matched, self.predicted + self.expected),
            "precision": _share(self.matched, self.predicted),
            "recall": _share(self.matched, self.expected),
            "accuracy": _share(self.right, self.words),
        }
        return {name: values[name] for name in self.names}

    def predictions(self) -> list[dict[str, Any]]:
        return [
            {"prediction": self.task.decode(said), "reference": self.task.decode(meant)} for said, meant in self.rows
        ]


def _parts(label: str) -> tuple[str, str]:
    """Where in an entity a word is, and the entity's kind."""
    match = TAG.fullmatch(label)
    assert match is not None, "the task has looked"
    return match[1], match[2] or ""


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
