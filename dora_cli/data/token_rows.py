"""Rows of tokens with labels, for language models: gathered one by one, and kept for later runs."""

import json
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_cli.data import tokens as texts
from dora_cli.data.cache import cache_folder, cached
from dora_cli.data.encoded import Encoded
from dora_cli.errors import UserError

IGNORED = -100  # the label of a token that is read but not learned
FORMAT = 2  # of what is cached: raise it when the same rows become other tokens
BLOCK = 1 << 20  # tokens that are gathered before they are given away


class NothingToLearnError(UserError):
    """Not one row of a split has a token to learn."""


class TokenRows:
    """Gathers rows, and gives them away in blocks.

    Args:
        max_length: longer rows lose their end.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.places: list[int] = []
        self.tokens: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.end = 0  # tokens given away
        self.waiting = 0  # tokens that are not
        self.truncated = 0
        self.unlearnable = 0  # rows without a token to learn, which are left out
        self.rewritten = 0  # conversations that became several rows
        self.unopened = 0  # conversations with a turn without the thought that the chat template begins

    def add(self, tokens: Sequence[int] | np.ndarray, learned: Sequence[bool] | np.ndarray, place: int) -> None:
        """One row: its tokens, which of them are learned, and its number in the split."""
        row = np.array(tokens, dtype=np.int32)
        labels = np.where(np.asarray(learned, dtype=bool), row, np.int32(IGNORED))
        if len(row) > self.max_length:
            row, labels = row[: self.max_length], labels[: self.max_length]
            self.truncated += 1
        labels[:1] = IGNORED  # nothing comes before it
        if (labels == IGNORED).all():
            self.unlearnable += 1
            return
        self.places.append(place)
        self.tokens.append(row)
        self.labels.append(labels)
        self.waiting += len(row)

    def full(self) -> Iterator[dict[str, Tensor]]:
        """A block where enough has been gathered for one, else none."""
        if self.waiting >= BLOCK:
            yield self.block()

    def block(self) -> dict[str, Tensor]:
        """What was gathered since the last block, flat: every column end to end, where its rows end as ``offsets`` (the
        first block's begin with 0), ``places``, and as ``counts`` three numbers of what happened."""
        none = [np.empty(0, np.int32)]
        ends = torch.tensor([self.end, *map(len, self.tokens)]).cumsum(0)
        block = {
            "input_ids": torch.from_numpy(np.concatenate(self.tokens or none)),
            "labels": torch.from_numpy(np.concatenate(self.labels or none)),
            "offsets": ends if self.end == 0 else ends[1:],
            "places": torch.tensor(self.places, dtype=torch.int64),
            "counts": torch.tensor([self.truncated, self.unlearnable, self.rewritten, self.unopened]),
        }
        self.places, self.tokens, self.labels = [], [], []
        self.end, self.waiting = int(ends[-1]), 0
        self.truncated = self.unlearnable = self.rewritten = self.unopened = 0
        return block


def encoded_rows(
    gather: Callable[[], Iterator[dict[str, Tensor]]],
    *,
    rows: Any,
    columns: Sequence[str],
    names: str,
    tokenizer: Any,
    max_length: int,
    settings: dict[str, Any],
    cache: str | None,
) -> Encoded:
    """What ``gather`` gives of a split, from the cache where it is kept there.

    Args:
        gather: gives the blocks of a ``TokenRows``.
        rows: the split.
        columns: those that the tokens follow from.
        names: the column that names a row in predictions.
        tokenizer: with all it does in Rust and its chat template; what one written in Python does is not kept.
        max_length: tokens of a row at most.
        settings: whatever else the tokens follow from, for JSON.
        cache: ``data.cache``.

    Raises:
        NothingToLearnError: there is not one row with anything to learn.
    """
    key, characters = digest_of(rows, columns, tokenizer, {"max_length": max_length, **settings})
    worth = key is not None and characters >= texts.CACHED_FROM
    made = cached(cache_folder(cache) if worth else None, lambda: key or "", gather)
    if not len(made["places"]):
        raise NothingToLearnError(
            f"no row of this split has anything to learn within data.max_length={max_length} tokens",
            hint="raise data.max_length, or look at the prompts",
        )
    truncated, unlearnable, rewritten, unopened = made["counts"].view(-1, 4).sum(0).tolist()
    notes = []
    if unlearnable:
        notes.append(f"{unlearnable:,} rows left out: nothing to learn within {max_length:,} tokens")
    if rewritten:
        notes.append(
            f"{rewritten:,} conversations became a row for each assistant turn, since the chat template writes "
            "earlier turns anew"
        )
    if unopened:
        notes.append(
            f"{unopened:,} conversations answer without the thought that the chat template begins for the model: "
            "learned is the turn as it stands, so prompt the model without it too"
        )
    places, count = made["places"], len(rows)
    all_there = len(places) == count and bool((places == torch.arange(count)).all())
    named = rows.with_format(None)
    return Encoded(
        ragged={name: made[name] for name in ("input_ids", "labels")},
        offsets=made["offsets"],
        scalars={},
        pads={"input_ids": tokenizer.pad_token_id, "labels": IGNORED},
        side=tokenizer.padding_side,
        ids=(named if all_there else named.select(places.numpy()))[names],
        truncated=truncated,
        places=None if all_there else places,
        notes=notes,
    )


def digest_of(rows: Any, columns: Sequence[str], tokenizer: Any, settings: dict[str, Any]) -> tuple[str | None, int]:
    """A digest of all that the tokens of a split follow from, and how many characters it has; None: not to be known."""
    import tokenizers
    import transformers

    rust = texts.rust_of(tokenizer)
    if rust is None:
        return None, 0
    facts = {
        "format": FORMAT,
        "versions": [tokenizers.__version__, transformers.__version__],
        "chat_template": tokenizer.chat_template,
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        **settings,
    }
    digest, characters = sha256(json.dumps(facts, sort_keys=True).encode()), 0
    try:
        digest.update(rust.to_str().encode())
    except Exception:  # what the Rust library raises has no class of its own
        return None, 0
    for batch in rows.select_columns(sorted(set(columns))).iter(1000):
        text = json.dumps(batch, sort_keys=True, default=str)
        characters += len(text)
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest(), characters
