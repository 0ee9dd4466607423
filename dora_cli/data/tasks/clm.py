"""Plain text: a model goes on learning to read."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks.causal import CausalTask
from dora_cli.data.tasks.text import check_texts
from dora_cli.data.token_rows import TokenRows, encoded_rows
from dora_cli.data.tokens import token_ids
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

ROLES = ("text", "id")
CHUNK = 500  # rows tokenised at once


class Clm(CausalTask):
    """Loss on every token of a text but the first. A text longer than ``data.max_length`` becomes several rows, each of
    which begins with the last token of the one before, so that every token is learned once; each text ends with the
    tokenizer's end token.
    """

    name = "clm"

    def fit(self, rows: Rows) -> None:
        if "exact_match" in self.metric_names:
            raise UserError("data.metrics: 'exact_match' is for data.task=sft: a text has no answer")
        asked: Mapping[str, str | None] = self.config.columns
        for role in asked:
            if role not in ROLES:
                raise UserError(f"unknown key 'data.columns.{role}'", hint=did_you_mean(role, ROLES))
        self.columns = {"text": asked.get("text") or "text"}
        first = next(iter(rows.splits.values())).column_names
        if (name := asked.get("id", "id")) and (name in first or "id" in asked):
            self.columns["id"] = name
        for role, dataset in rows.splits.items():
            for column in self.columns.values():
                if column not in dataset.column_names:
                    raise UserError(
                        f"there is no column '{column}'",
                        where=f"{rows.origin.get(role) or f'split {role!r} of {rows.source}'} has: "
                        + ", ".join(name for name in dataset.column_names if name != ROW),
                        hint="say which it is with data.columns.text=NAME",
                    )
            check_texts(rows, role, [self.columns["text"]])

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        return encoded_rows(
            lambda: self._gather(rows, tokenizer),
            rows=rows,
            columns=[self.columns["text"]],
            names=self.columns.get("id", ROW),
            tokenizer=tokenizer,
            max_length=self.config.max_length,
            settings={"task": self.name},
            cache=self.config.cache,
        )

    def _gather(self, rows: Any, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
        gathered, end, place = TokenRows(self.config.max_length), tokenizer.eos_token_id, 0
        for chunk in rows.select_columns([self.columns["text"]]).iter(CHUNK):
            texts = chunk[self.columns["text"]]
            for ids in token_ids(texts, tokenizer):
                if end is not None and ids[-1:] != [end]:
                    ids.append(end)
                tokens = np.array(ids, dtype=np.int32)
                for start in range(0, max(len(tokens) - 1, 1), max(self.config.max_length - 1, 1)):
                    window = tokens[start : start + self.config.max_length]
                    gathered.add(window, np.ones(len(window), dtype=bool), place)
                place += 1
            yield from gathered.full()
        yield gathered.block()
