"""Tokenised rows: packed flat in memory, padded to the longest row of a batch on demand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dora_cli.errors import UserError

CHUNK = 1000  # rows tokenised at once


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
    """

    ragged: dict[str, Tensor]
    offsets: Tensor
    scalars: dict[str, Tensor]
    pads: dict[str, int]
    side: str = "right"
    ids: list[Any] = field(default_factory=list)
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = self.offsets[index], self.offsets[index + 1]
        example = {name: values[start:end] for name, values in self.ragged.items()}
        return example | {name: values[index] for name, values in self.scalars.items()}

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, shape ``(N,)``."""
        return self.offsets[1:] - self.offsets[:-1]

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, padded to its longest row.

        Returns:
            Every ragged column and ``attention_mask`` (1 for tokens, 0 for padding), shape ``(n, s)``, int64; every
            scalar column, shape ``(n,)``.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        batch = {name: torch.full(shape, pad, dtype=torch.int64) for name, pad in self.pads.items()}
        batch["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            where = slice(0, length) if self.side == "right" else slice(shape[1] - length, shape[1])
            for name in self.pads:
                batch[name][row, where] = example[name].long()
            batch["attention_mask"][row, where] = 1
        return batch | {name: torch.stack([example[name] for example in examples]) for name in self.scalars}


def tokenize(
    texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Any, *, max_length: int, scalars: dict[str, Tensor]
) -> Encoded:
    """Tokenise texts, or pairs of texts, with the tokenizer's special tokens.

    A row longer than ``max_length`` loses tokens from the end of its longer text, and is counted. A tokenizer that puts
    nothing between two texts (GPT-2, Llama) gets a line break between them, so that their words do not run together.

    Args:
        texts: one a row.
        pairs: the second text of each row, or ``None``.
        tokenizer: of transformers.
        max_length: tokens, special ones included.
        scalars: the columns that go along, shape ``(N,)`` each.

    Raises:
        UserError: ``max_length`` leaves no room beside the special tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if max_length <= special + (pairs is not None):
        raise UserError(
            f"data.max_length={max_length} leaves no room for text",
            where=f"the tokenizer adds {special} special tokens to a row",
            hint="raise data.max_length",
        )
    if pairs is not None and special == tokenizer.num_special_tokens_to_add(pair=False):
        texts = [f"{text}\n" for text in texts]
    # A text without any token still needs one to be read at.
    empty = next(i for i in (tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id) if i is not None)
    pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    names = [name for name in pads if name in tokenizer.model_input_names]
    flat: dict[str, list[Tensor]] = {name: [] for name in names}
    lengths: list[int] = []
    truncated = 0
    for start in range(0, len(texts), CHUNK):
        first = list(texts[start : start + CHUNK])
        second = None if pairs is None else list(pairs[start : start + CHUNK])
        rows = tokenizer(first, second, return_attention_mask=False, verbose=False)
        for i, tokens in enumerate(rows["input_ids"]):
            row = {name: rows[name][i] for name in names}
            if len(tokens) > max_length:
                truncated += 1
                cut = (first[i],) if second is None else (first[i], second[i])
                row = tokenizer(*cut, truncation=True, max_length=max_length, return_attention_mask=False)
            elif not tokens:
                row = {name: [empty if name == "input_ids" else pads[name]] for name in names}
            lengths.append(len(row["input_ids"]))
            for name in names:
                flat[name].append(torch.tensor(row[name], dtype=torch.int32))
    return Encoded(
        ragged={name: torch.cat(rows) for name, rows in flat.items()},
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        scalars=scalars,
        pads={name: pads[name] for name in names},
        side=tokenizer.padding_side,
        truncated=truncated,
    )
