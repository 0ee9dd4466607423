"""From texts to token rows: on all cores, with few Python objects, and once for any number of runs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_cli.data.cache import cached
from dora_cli.data.encoded import Encoded
from dora_cli.errors import UserError

CHUNK, CHUNK_CHARACTERS = 1000, 4_000_000  # rows tokenised at once, at most; their tokens take much memory meanwhile
CACHED_FROM = 1_000_000  # characters; fewer are tokenised about as soon as a cache is asked
FORMAT = 1  # of what is cached: raise it when the tokens of the same texts become others

Columns = dict[str, list[list[int]]]  # column → one list a row


class NoRoom(Exception):
    """Row number ``row`` is longer than allowed by its second text alone, which was to be kept."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


def tokenize(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: Any,
    *,
    max_length: int,
    scalars: dict[str, Tensor],
    cache: Path | None = None,
    keep_pairs: bool = False,
    key: str = "data.max_length",
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
        cache: where the tokens of large sets are kept for the next run; ``None``: nowhere. What a tokenizer that is
            written in Python does cannot be put into a key: its tokens are not kept.
        keep_pairs: a row loses tokens from its first text alone.
        key: what sets ``max_length``, for messages.

    Raises:
        UserError: ``max_length`` leaves no room beside the special tokens.
        NoRoom: a second text that is to be kept is longer than that.
    """
    special = check_room(tokenizer, max_length, pair=pairs is not None, key=key)
    apart = pairs is None or special != tokenizer.num_special_tokens_to_add(pair=False)
    pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    pads = {name: pad for name, pad in pads.items() if name in tokenizer.model_input_names}
    end = "" if apart else "\n"
    job = _Job(texts, pairs, end, tokenizer, rust_of(tokenizer), max_length, _empty_row(tokenizer, pads), keep_pairs)
    worth = job.is_known and job.is_worth_keeping()
    tokens = cached(cache if worth else None, job.key, job.tokens)
    return Encoded(
        ragged={name: tokens[name] for name in pads},
        offsets=tokens["offsets"],
        scalars=scalars,
        pads=pads,
        side=tokenizer.padding_side,
        truncated=int(tokens["truncated"].sum()),
    )


def check_room(tokenizer: Any, max_length: int, *, pair: bool = False, key: str = "data.max_length") -> int:
    """How many special tokens go to a row of one text, or of a pair.

    Raises:
        UserError: ``max_length`` leaves no room beside them.
    """
    special: int = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special + pair:
        raise UserError(
            f"{key}={max_length} leaves no room for text",
            where=f"the tokenizer adds {special} special tokens to a row",
            hint=f"raise {key}",
        )
    return special


def rust_of(tokenizer: Any) -> Any:
    """The Rust tokenizer where it does all the work, set neither to cut nor to pad; ``None`` elsewhere.

    Asking it directly takes half the time that it takes through transformers, whose classes may override what they do.
    """
    from transformers import PreTrainedTokenizerFast

    of = type(tokenizer)
    plain = isinstance(tokenizer, PreTrainedTokenizerFast) and of.__call__ is PreTrainedTokenizerFast.__call__
    if not plain or of._encode_plus is not PreTrainedTokenizerFast._encode_plus:
        return None
    rust = tokenizer.backend_tokenizer
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = tokenizer.split_special_tokens
    return rust


def token_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text, special ones included, none cut."""
    rust = rust_of(tokenizer)
    if rust is None:
        ids: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        return ids
    return [encoding.ids for encoding in rust.encode_batch_fast(texts)]


def _empty_row(tokenizer: Any, pads: dict[str, int]) -> dict[str, list[int]]:
    """What stands for a text without any token: it still needs one to be read at."""
    ends = (tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
    return {name: [pad] for name, pad in pads.items()} | {"input_ids": [next(i for i in ends if i is not None)]}


@dataclass(frozen=True)
class _Job:
    """All that the tokens of a split follow from.

    Attributes:
        texts, pairs: read in order, a chunk at a time: they may lie on disk.
        end: what is put after a first text.
        empty: column → the row of a text without tokens.
    """

    texts: Sequence[str]
    pairs: Sequence[str] | None
    end: str
    tokenizer: Any
    rust: Any
    max_length: int
    empty: dict[str, list[int]]
    keep_pairs: bool

    def tokens(self) -> Iterator[dict[str, Tensor]]:
        """In blocks: every column, in all shape ``(Σ s_i,)``, int32; ``offsets``, in all shape ``(N + 1,)``;
        ``truncated``, one number a block."""
        end = count = 0
        for first, second in self._chunks():
            columns, cut = (self._by_python if self.rust is None else self._by_rust)(first, second)
            for i, row in enumerate(columns["input_ids"] if cut else ()):
                if len(row) > self.max_length:
                    raise NoRoom(count + i)
            lengths = [len(row) or 1 for row in columns["input_ids"]]
            block = {}
            count += len(lengths)
            for name, rows in columns.items():
                full = [row or self.empty[name] for row in rows]
                block[name] = torch.from_numpy(np.fromiter(chain.from_iterable(full), np.int32, sum(lengths)))
            ends = torch.tensor([end, *lengths]).cumsum(0)
            block["offsets"] = ends if end == 0 else ends[1:]
            block["truncated"] = torch.tensor([cut])
            end = int(ends[-1])
            yield block

    def is_worth_keeping(self) -> bool:
        """Whether there are so many characters; no more are read than it takes to know."""
        characters = 0
        for column in (self.texts, self.pairs or ()):
            for start in range(0, len(column), CHUNK):
                characters += sum(map(len, column[start : start + CHUNK]))
                if characters >= CACHED_FROM:
                    return True
        return False

    @property
    def is_known(self) -> bool:
        """Whether all that the tokenizer does can be put into a key: no part of it is written in Python."""
        try:
            return self.rust is not None and bool(self.rust.to_str())
        except Exception:  # what the Rust library raises has no class of its own
            return False

    def key(self) -> str:
        """A digest of everything here, and of the versions of what does the work."""
        import tokenizers
        import transformers

        facts = {
            "format": FORMAT,
            "versions": [tokenizers.__version__, transformers.__version__],
            "rows": [len(self.texts), self.pairs is not None],  # with the lengths below, no two splits read the same
            "max_length": self.max_length,
            "empty": self.empty,
            "end": self.end,
            "side": self.tokenizer.truncation_side,
            "keep_pairs": self.keep_pairs,
            "split_special_tokens": self.tokenizer.split_special_tokens,
        }
        digest = sha256(json.dumps(facts).encode())
        digest.update(self.rust.to_str().encode())
        for column in (self.texts, self.pairs or ()):
            for start in range(0, len(column), CHUNK):
                chunk = column[start : start + CHUNK]
                digest.update(np.fromiter(map(len, chunk), np.int64, len(chunk)).data)
                digest.update("".join(chunk).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _chunks(self) -> Iterator[tuple[list[str], list[str] | None]]:
        """Texts and second texts to tokenise at once."""
        for start in range(0, len(self.texts), CHUNK):
            first: list[str] = []
            second: list[str] = []
            characters = 0
            pairs = repeat("") if self.pairs is None else self.pairs[start : start + CHUNK]
            for text, pair in zip(self.texts[start : start + CHUNK], pairs, strict=False):
                first.append(text + self.end)
                second.append(pair)
                characters += len(text) + len(pair)
                if characters >= CHUNK_CHARACTERS:
                    yield first, None if self.pairs is None else second
                    first, second, characters = [], [], 0
            if first:
                yield first, None if self.pairs is None else second

    def _by_rust(self, first: list[str], second: list[str] | None) -> tuple[Columns, int]:
        encodings = self.rust.encode_batch_fast(first if second is None else list(zip(first, second, strict=True)))
        columns = {"input_ids": [e.ids for e in encodings]}
        if "token_type_ids" in self.empty:
            columns["token_type_ids"] = [e.type_ids for e in encodings]
        long = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) > self.max_length]
        for i in long:
            sequences, side = encodings[i].sequence_ids, self.tokenizer.truncation_side
            for span in _surplus(sequences, self.max_length, side, keep_pair=self.keep_pairs):
                for rows in columns.values():
                    del rows[i][span]
        return columns, len(long)

    def _by_python(self, first: list[str], second: list[str] | None) -> tuple[Columns, int]:
        quiet = {"return_attention_mask": False, "verbose": False}
        made = self.tokenizer(first, second, **quiet)
        columns = {name: list(made[name]) for name in self.empty}
        long = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) > self.max_length]
        if long:
            again = [column and [column[i] for i in long] for column in (first, second)]
            how = "only_first" if self.keep_pairs else "longest_first"
            cut = self.tokenizer(*again, truncation=how, max_length=self.max_length, **quiet)
            for name, rows in columns.items():
                for i, row in zip(long, cut[name], strict=True):
                    rows[i] = row
        return columns, len(long)


def _surplus(sequences: list[int | None], max_length: int, side: str, *, keep_pair: bool = False) -> list[slice]:
    """What goes from a row that is too long, last first: the longer text gives until both are equal, as when the
    tokenizer cuts; with ``keep_pair`` the first one alone gives what it has. (The tokenizer's own cut keeps every piece
    that it cuts off, of two long texts every pair of pieces.)

    Args:
        sequences: for every token the text that it comes from, 0 or 1; ``None`` for special tokens.
        max_length: how many tokens may stay.
        side: where a text loses tokens, ``right`` or ``left``.
    """
    counts = sequences.count(0), sequences.count(1)
    room = max_length - sequences.count(None)
    shorter = min(*counts, room // 2)
    shares = (shorter, room - shorter) if counts[0] <= counts[1] else (room - shorter, shorter)
    if keep_pair:
        shares = max(room - counts[1], 0), counts[1]
    spans = []
    for text, (count, share) in enumerate(zip(counts, shares, strict=True)):
        if count > share:
            start = sequences.index(text) + (share if side == "right" else 0)
            spans.append(slice(start, start + count - share))
    return sorted(spans, key=lambda span: span.start, reverse=True)
