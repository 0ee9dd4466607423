"""Tokenised rows: flat in memory or mapped from a file, padded to the longest row of a batch on demand."""

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
    without dimensions. Notation: ``N`` rows, ``s_i`` tokens of row i, ``n`` rows and ``s`` tokens of a batch, ``t``
    tokens of its targets.

    Attributes:
        ragged: name → all rows of a column end to end, shape ``(Σ s_i,)``, int32; one of them is ``input_ids``.
        offsets: where each row starts, and the end, shape ``(N + 1,)``.
        scalars: name → one value a row, shape ``(N,)``, e.g. ``labels``.
        pads: name of a ragged column → the value to pad it with.
        side: ``right`` or ``left``, where the tokenizer pads.
        ids: what names a row in a file of predictions; it may be read when it is looked at.
        truncated: rows that were longer than allowed and lost their end.
        places: for every row its number in the split, where rows were left out; ``None`` where all are there.
        notes: sentences for the plan on what was left out, and why.
        target: of an encoder-decoder, what is to be written of every row: its one column is ``labels``.
        references: of every row what its prediction is compared with, where its tokens do not hold all of it; of a
            window the split's rows, where it is looked up.
        windows_of: how many rows of the split these are windows of (``places`` says which), where one prediction comes
            of all windows of a row; ``None`` where each stands for itself.
    """

    ragged: dict[str, Tensor]
    offsets: Tensor
    scalars: dict[str, Tensor]
    pads: dict[str, int]
    side: str = "right"
    ids: Sequence[Any] = field(default_factory=list)
    truncated: int = 0
    places: Sequence[int] | Tensor | None = None
    notes: list[str] = field(default_factory=list)
    target: "Encoded | None" = None
    references: Sequence[Any] = ()
    windows_of: int | None = None
    _fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = self.offsets[index], self.offsets[index + 1]
        example = {name: values[start:end] for name, values in self.ragged.items()}
        example |= {name: values[index] for name, values in self.scalars.items()}
        return example if self.target is None else example | self.target[index]

    def place(self, row: int) -> int:
        """The number of a row in the split that it was read from."""
        return row if self.places is None else int(self.places[row])

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, its target's among them, shape ``(N,)``."""
        own = self.offsets[1:] - self.offsets[:-1]
        return own if self.target is None else own + self.target.lengths

    def longest(self, n: int) -> list[int]:
        """``n`` row numbers, repeated, whose batch is as large as any of ``n`` rows."""
        rows = [int(self.lengths.argmax())] * n
        if self.target is not None and n > 1:  # the longest text need not have the longest target
            rows[:2] = int(self.offsets.diff().argmax()), int(self.target.lengths.argmax())
        return rows

    def parts(self, row: int) -> list[slice]:
        """Of the tokens of ``self[row]``, those that the model reads together."""
        return [slice(0, int(self.offsets[row + 1] - self.offsets[row]))]

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
            target=None if self.target is None else self.target.select(rows),
            references=[self.references[i] for i in rows] if len(self.references) else (),
            _fingerprint=None,
        )

    def fingerprint(self) -> str:
        """What tells these rows from others: lengths, labels, and all tokens or, of large sets, millions of them."""
        if self._fingerprint is None:  # every checkpoint asks, and a large set is read from disk for it
            self._fingerprint = self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        digest = sha256()
        for name, values in sorted(self.scalars.items()):
            digest.update(name.encode() + values.contiguous().numpy().tobytes())
        for values in (self.offsets, *(values for _, values in sorted(self.ragged.items()))):
            digest.update(values[:: len(values) // LOOKS + 1].contiguous().numpy().tobytes())
        if self.target is not None:
            digest.update(self.target.fingerprint().encode())
        return digest.hexdigest()

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows of these numbers, padded to the longest of them.

        Returns:
            Every ragged column and ``attention_mask`` (1 for tokens, 0 for padding), shape ``(n, s)``, int64; every
            scalar column, shape ``(n,)``. With a target also its ``labels`` and ``decoder_attention_mask``, shape
            ``(n, t)``.
        """
        index = np.asarray(rows, dtype=np.int64)
        batch = self._padded(self.offsets, index) | self._scalars(index)
        if self.target is not None:
            target = self.target.batch(rows)
            batch |= {"decoder_attention_mask": target.pop("attention_mask"), **target}
        return batch

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
