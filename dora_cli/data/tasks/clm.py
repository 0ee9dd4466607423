"""Plain text: a model goes on learning to read."""

from collections.abc import Mapping
from typing import Any

from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks.causal import CausalTask, TokenRows
from dora_cli.data.tasks.text import check_texts
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

ROLES = ("text", "id")
CHUNK = 500  # rows tokenised at once


class Clm(CausalTask):
    """Loss on every token of a text but the first. A text longer than ``data.max_length`` becomes several rows, each
    with as many tokens as fit, so that nothing is lost; each text ends with the tokenizer's end token.
    """

    name = "clm"

    def fit(self, rows: Rows) -> None:
        if self.config.template is not None:
            raise UserError("data.template is for data.task=sft", hint="set data.template=null")
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
        gathered = TokenRows(self.config.max_length)
        names, end, place = self.columns.get("id", ROW), tokenizer.eos_token_id, 0
        several = False
        for chunk in rows.select_columns(list({self.columns["text"], names})).iter(CHUNK):
            made = tokenizer(chunk[self.columns["text"]], return_attention_mask=False, verbose=False)["input_ids"]
            for tokens, name in zip(made, chunk[names], strict=True):
                if end is not None and tokens[-1:] != [end]:
                    tokens = [*tokens, end]
                for start in range(0, len(tokens), self.config.max_length):
                    window = tokens[start : start + self.config.max_length]
                    gathered.add(window, [True] * len(window), name=name, place=place)
                    several = several or start > 0
                place += 1
        encoded = gathered.encoded(tokenizer, "this split")
        encoded.places = gathered.places if several or gathered.unlearnable else None
        return encoded
