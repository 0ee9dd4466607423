"""Questions with contexts of any length → token rows of limited length, and back from tokens to characters."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dora_cli.errors import UserError

CHUNK = 500  # rows tokenised at once

# What stands for every window beside its tokens; positions count from the window's first token.
SCALARS = (
    "row",  # number of the row that it is a window of
    "first",  # position of its first context token
    "size",  # how many context tokens it has
    "skipped",  # how many context tokens of the row come before it
    "null",  # position that stands for "no answer here"
    "start",  # position of the answer's first token, or null
    "end",  # position of the answer's last token, or null
)


class Asked(NamedTuple):
    """``span``: characters [start, end) of the answer in the context, or ``None``."""

    question: str
    context: str
    span: tuple[int, int] | None


class Unfit(ValueError):
    """A row that no window can be made of: its number, and why in words."""

    def __init__(self, row: int, message: str, hint: str) -> None:
        super().__init__(message)
        self.row, self.message, self.hint = row, message, hint


def cut_windows(
    rows: Iterable[Asked], tokenizer: Any, *, max_length: int, overlap: int, types: bool
) -> dict[str, Tensor]:
    """Tokenise rows, each as one window or several that overlap: the question whole, and a piece of the context.

    A window has what the tokenizer puts around a pair of texts; where it puts nothing between them (GPT-2), a line
    break ends the question. A window that lacks any part of the answer has none.

    Args:
        rows: what is asked.
        tokenizer: of transformers, one that says where in a text its tokens come from.
        max_length: tokens of a window at most.
        overlap: context tokens that a window has in common with the one before.
        types: whether token types are wanted.

    Returns:
        Of N windows: ``input_ids`` (and ``token_type_ids``) end to end, shape ``(Σ s_i,)``; ``offsets``, shape
        ``(N + 1,)``; ``SCALARS``, shape ``(N,)`` each. Of R rows: the first character of every context token and the
        one behind its last, ``char_starts`` and ``char_ends``, end to end, shape ``(Σ t_j,)``; ``char_offsets``, shape
        ``(R + 1,)``.

    Raises:
        UserError: the lengths leave no room, whatever the question.
        Unfit: a row whose question leaves no room, or whose context or answer has no token.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"data.task=qa: {type(tokenizer).__name__} does not say where in the text its tokens come from",
            hint="it needs a tokenizer written in Rust: a model with a tokenizer.json",
        )
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length - special - 1 <= overlap:
        raise UserError(
            f"data.max_length={max_length} leaves no room for a question and more than {overlap} tokens of the context",
            where=f"the tokenizer adds {special} special tokens, and windows share data.doc_stride={overlap}",
            hint="raise data.max_length or lower data.doc_stride",
        )
    between = "" if special > tokenizer.num_special_tokens_to_add(pair=False) else "\n"
    made = _Made()
    for chunk in _chunks(rows):
        questions, contexts = [row.question + between for row in chunk], [row.context for row in chunk]
        encodings = tokenizer(questions, contexts, return_attention_mask=False, verbose=False).encodings
        for row, encoding in zip(chunk, encodings, strict=True):
            made.add(row, encoding, tokenizer.cls_token_id, max_length, overlap)
    return made.tensors(types)


def _chunks(rows: Iterable[Asked]) -> Iterator[list[Asked]]:
    left = iter(rows)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


@dataclass
class _Made:
    """Windows so far."""

    ids: list[np.ndarray] = field(default_factory=list)  # of every window
    types: list[np.ndarray] = field(default_factory=list)
    scalars: list[tuple[int, ...]] = field(default_factory=list)
    chars: list[np.ndarray] = field(default_factory=list)  # (t_j, 2) of every row

    def add(self, row: Asked, encoding: Any, cls: int | None, max_length: int, overlap: int) -> None:
        """The windows of one row, of its tokens without a cut."""
        number, texts = len(self.chars), encoding.sequence_ids
        size = texts.count(1)
        if not size:
            raise Unfit(number, "the tokenizer makes no token of its context", "correct or remove the row")
        first = texts.index(1)
        room = max_length - (len(texts) - size)
        if size > room and room <= overlap:
            raise Unfit(
                number,
                f"its question has {texts.count(0)} tokens and leaves {max(room, 0)} of data.max_length={max_length} "
                f"for the context, of which windows share data.doc_stride={overlap}",
                "raise data.max_length, lower data.doc_stride, or shorten the question",
            )
        ids, types = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)
        chars = np.array(encoding.offsets, np.int32).reshape(-1, 2)[first : first + size]
        answer = _tokens_of(row.span, chars)
        if row.span is not None and answer is None:
            raise Unfit(number, "the tokenizer makes no token of its answer", "correct or remove the row")
        own = [
            i for i, (text, token) in enumerate(zip(texts, encoding.ids, strict=True)) if text is None and token == cls
        ]
        null = own[0] if own else 0
        for skipped in range(0, max(size - overlap, 1), max(room - overlap, 1)):
            taken = min(room, size - skipped)
            cut = np.r_[0:first, first + skipped : first + skipped + taken, first + size : len(ids)]
            moved = null if null < first else null - size + taken
            within = answer is not None and skipped <= answer[0] and answer[1] < skipped + taken
            start, end = (first - skipped + token for token in answer) if within and answer else (moved, moved)
            self.ids.append(ids[cut])
            self.types.append(types[cut])
            self.scalars.append((number, first, taken, skipped, moved, start, end))
        self.chars.append(chars)

    def tensors(self, types: bool) -> dict[str, Tensor]:
        """All of it, flat."""
        scalars = torch.tensor(self.scalars).T.contiguous()
        chars = torch.from_numpy(np.concatenate(self.chars))
        return {
            "input_ids": torch.from_numpy(np.concatenate(self.ids)),
            **({"token_type_ids": torch.from_numpy(np.concatenate(self.types))} if types else {}),
            "offsets": torch.tensor([0, *map(len, self.ids)]).cumsum(0),
            **{name: scalars[i].clone() for i, name in enumerate(SCALARS)},
            "char_starts": chars[:, 0].clone(),
            "char_ends": chars[:, 1].clone(),
            "char_offsets": torch.tensor([0, *map(len, self.chars)]).cumsum(0),
        }


def _tokens_of(span: tuple[int, int] | None, chars: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token with any character of a span: some tokenizers join a word to the space before."""
    if span is None:
        return None
    touched = np.flatnonzero((chars[:, 0] < span[1]) & (chars[:, 1] > span[0]))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None
