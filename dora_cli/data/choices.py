"""Questions with several choices: one row a question, read as one text a choice."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dora_cli.data.encoded import Encoded

CHOICES = "choices"  # the scalar column that says how many a question has


@dataclass
class EncodedChoices(Encoded):
    """Questions whose choices lie end to end in the ragged columns; ``scalars`` has ``choices``, how many each has.

    A batch holds the choices of all its questions, c for each, as rows: shape ``(n · c, s)``. A question with fewer
    than c repeats its last one, which ``choices`` tells from real ones.

    Attributes:
        cuts: where each choice starts in the ragged columns, and the end, shape ``(choices of all questions + 1,)``.
    """

    cuts: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @classmethod
    def grouped(cls, rows: Encoded, counts: Sequence[int], labels: Tensor) -> "EncodedChoices":
        """Questions of rows that are a choice each.

        Args:
            rows: all choices in order, without scalar columns.
            counts: how many of them belong to each question.
            labels: the right one of each, shape ``(N,)``.
        """
        choices = torch.tensor(counts)
        offsets = rows.offsets[torch.tensor([0, *counts]).cumsum(0)]
        return cls(
            ragged=rows.ragged,
            offsets=offsets,
            scalars={"labels": labels, CHOICES: choices},
            pads=rows.pads,
            side=rows.side,
            cuts=rows.offsets,
        )

    @property
    def lengths(self) -> Tensor:
        """Tokens of every question when its choices are padded to the longest one, shape ``(N,)``."""
        counts = self.scalars[CHOICES]
        longest = torch.segment_reduce((self.cuts[1:] - self.cuts[:-1]).double(), "max", lengths=counts)
        return longest.long() * counts

    def parts(self, row: int) -> list[slice]:
        first, count = int(self.scalars[CHOICES][:row].sum()), int(self.scalars[CHOICES][row])
        bounds = (self.cuts[first : first + count + 1] - self.offsets[row]).tolist()
        return [slice(*pair) for pair in pairwise(bounds)]

    def select(self, rows: Sequence[int]) -> "EncodedChoices":
        chosen = super().select(rows)
        assert isinstance(chosen, EncodedChoices)
        lengths = [part.stop - part.start for row in rows for part in self.parts(row)]
        return replace(chosen, cuts=torch.tensor([0, *lengths]).cumsum(0))

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The questions of these numbers, every choice padded to the longest of them all: ragged columns and
        ``attention_mask``, shape ``(n · c, s)``, int64; scalar columns, shape ``(n,)``."""
        index = np.asarray(rows, dtype=np.int64)
        counts = self.scalars[CHOICES].numpy()
        first = counts.cumsum()[index] - counts[index]
        places = first[:, None] + np.minimum(np.arange(counts[index].max()), counts[index, None] - 1)  # (n, c)
        return self._padded(self.cuts, places.ravel()) | self._scalars(index)
