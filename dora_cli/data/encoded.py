"""Tokenised rows: packed flat in memory, padded to the longest row of a batch on demand."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOOKS = 1 << 22  # numbers of a column that a fingerprint reads


@dataclass
class Encoded:
    """A data set of token rows.

    ``encoded[i]`` is one example: every ragged column as a tensor of shape ``(s_i,)``, every scalar column as a tensor
    without dimensions. Notation: ``N`` rows, ``s_i`` tokens of row i, ``n`` rows and ``s`` tokens of a batch.

    Attributes:
        ragged: name → all rows of a column end to end, shape ``(Σ s_i,)``, int32; one of them is ``input_ids``.
        offsets: where each row starts, and the end, shape ``(N + 1,)``.
        scalars: name → one value a row, shape ``(N,)``, e.g. ``labels``.
        pads: name of a ragged column → the value to pad it with.
        side: ``right`` or ``left``, where the tokenizer pads.
        ids: what names a row in a file of predictions.
        truncated: rows that were longer than allowed and lost their end.
        places: for every row its number in the split, where rows were left out; ``None`` where all are there.
        notes: sentences for the plan on what was left out, and why.
    """

    ragged: dict[str, Tensor]
    offsets: Tensor
    scalars: dict[str, Tensor]
    pads: dict[str, int]
    side: str = "right"
    ids: list[Any] = field(default_factory=list)
    truncated: int = 0
    places: list[int] | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = self.offsets[index], self.offsets[index + 1]
        example = {name: values[start:end] for name, values in self.ragged.items()}
        return example | {name: values[index] for name, values in self.scalars.items()}

    def place(self, row: int) -> int:
        """The number of a row in the split that it was read from."""
        return row if self.places is None else self.places[row]

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, shape ``(N,)``."""
        return self.offsets[1:] - self.offsets[:-1]

    def parts(self, row: int) -> list[slice]:
        """Of the tokens of ``self[row]``, those that the model reads together."""
        return [slice(0, int(self.lengths[row]))]

    def select(self, rows: Sequence[int]) -> "Encoded":
        """These rows alone, in this order."""
        spans = [slice(int(self.offsets[i]), int(self.offsets[i + 1])) for i in rows]
        return replace(
            self,
            ragged={name: torch.cat([values[span] for span in spans]) for name, values in self.ragged.items()},
            offsets=torch.tensor([0, *(span.stop - span.start for span in spans)]).cumsum(0),
            scalars={name: values[torch.tensor(rows)] for name, values in self.scalars.items()},
            ids=[self.ids[i] for i in rows] if self.ids else [],
            places=[self.place(i) for i in rows],
        )

    def fingerprint(self) -> str:
        """What tells these rows from others: lengths, labels, and all tokens or, of large sets, millions of them."""
        digest = sha256()
        for name, values in sorted(self.scalars.items()):
            digest.update(name.encode() + values.contiguous().numpy().tobytes())
        for values in (self.offsets, *(values for _, values in sorted(self.ragged.items()))):
            digest.update(values[:: len(values) // LOOKS + 1].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows of these numbers, padded to the longest of them.

        Returns:
            Every ragged column and ``attention_mask`` (1 for tokens, 0 for padding), shape ``(n, s)``, int64; every
            scalar column, shape ``(n,)``.
        """
        index = np.asarray(rows, dtype=np.int64)
        return self._padded(self.offsets, index) | self._scalars(index)

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What a ``DataLoader`` asks for: a whole batch at once."""
        return self.batch(rows)

    def _scalars(self, index: np.ndarray) -> dict[str, Tensor]:
        return {name: values[torch.from_numpy(index)] for name, values in self.scalars.items()}

    def _padded(self, offsets: Tensor, index: np.ndarray) -> dict[str, Tensor]:
        """Stretches of the ragged columns, between the offsets of these numbers, padded to the longest of them."""
        # numpy: the same few operations start several times faster there than in torch
        bounds = offsets.numpy()
        starts, ends = bounds[index], bounds[index + 1]
        width = int((ends - starts).max())
        left = starts if self.side == "right" else ends - width
        places = left[:, None] + np.arange(width)  # (n, s), where each position lies in the flat columns
        real = places < ends[:, None] if self.side == "right" else places >= starts[:, None]
        padding = ~real
        batch = {}
        for name, pad in self.pads.items():
            values = self.ragged[name].numpy().take(places, mode="clip").astype(np.int64)
            np.copyto(values, pad, where=padding)
            batch[name] = torch.from_numpy(values)
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        return batch
