"""Rows of tokens with labels, for language models: gathered one by one, and kept for later runs."""

import json
from collections.abc import Callable, Iterable, Sequence
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


class TokenRows:
    """Gathers rows.

    Args:
        max_length: longer rows lose their end.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.places: list[int] = []
        self.tokens: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.truncated = 0
        self.unlearnable = 0  # rows without a token to learn, which are left out
        self.rewritten = 0  # conversations that became several rows
        self.unopened = 0  # conversations with a turn without the thought that the chat template begins

    def add(self, tokens: Iterable[int], learned: Iterable[bool], place: int) -> None:
        """One row: its tokens, which of them are learned, and its number in the split."""
        row = np.fromiter(tokens, np.int32)
        labels = np.where(np.fromiter(learned, bool, len(row)), row, IGNORED).astype(np.int32)
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

    def tensors(self) -> dict[str, Tensor]:
        """All of it, flat: every column end to end, ``offsets``, ``places``, and ``counts`` of what happened."""
        none = [np.empty(0, np.int32)]
        return {
            "input_ids": torch.from_numpy(np.concatenate(self.tokens or none)),
            "labels": torch.from_numpy(np.concatenate(self.labels or none)),
            "offsets": torch.tensor([0, *map(len, self.tokens)]).cumsum(0),
            "places": torch.tensor(self.places, dtype=torch.int64),
            "counts": torch.tensor([self.truncated, self.unlearnable, self.rewritten, self.unopened]),
        }


def encoded_rows(
    gather: Callable[[], TokenRows],
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
        rows: the split.
        columns: those that the tokens follow from.
        names: the column that names a row in predictions.
        tokenizer: with all it does in Rust and its chat template; what one written in Python does is not kept.
        max_length: tokens of a row at most.
        settings: whatever else the tokens follow from, for JSON.
        cache: ``data.cache``.

    Raises:
        UserError: there is not one row with anything to learn.
    """
    key, characters = digest_of(rows, columns, tokenizer, {"max_length": max_length, **settings})
    worth = key is not None and characters >= texts.CACHED_FROM
    made = cached(cache_folder(cache) if worth else None, lambda: key or "", lambda: gather().tensors())
    if not len(made["places"]):
        raise UserError(
            f"no row of this split has anything to learn within data.max_length={max_length} tokens",
            hint="raise data.max_length, or look at the prompts",
        )
    truncated, unlearnable, rewritten, unopened = made["counts"].tolist()
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
    places = made["places"].tolist()
    named = rows.with_format(None)[names][:]
    return Encoded(
        ragged={name: made[name] for name in ("input_ids", "labels")},
        offsets=made["offsets"],
        scalars={},
        pads={"input_ids": tokenizer.pad_token_id, "labels": IGNORED},
        side=tokenizer.padding_side,
        ids=[named[place] for place in places],
        truncated=truncated,
        places=None if places == list(range(len(rows))) else places,
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
