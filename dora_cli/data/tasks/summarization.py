"""Summaries: an encoder reads a document, a decoder learns to write what it says."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dora_cli.data.cache import cache_folder
from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks.base import Loss
from dora_cli.data.tasks.conversations import check_template, filled
from dora_cli.data.tasks.text import check_texts, find_columns, values
from dora_cli.data.tasks.token_task import TokenTask, token_loss
from dora_cli.data.token_rows import IGNORED
from dora_cli.data.tokens import tokenize
from dora_cli.errors import UserError

NEEDED = ("document", "summary")
COLUMNS = {"document": ["document"], "summary": ["summary"], "id": ["id", "idx"]}


class Summarization(TokenTask):
    """A summary for a document, by an encoder-decoder (see ``Task``).

    A batch holds ``input_ids`` and ``attention_mask``, shape ``(n, s)``, and ``labels``, shape ``(n, t)``: the tokens
    of each summary up to its end token, each of which is predicted from the document and the tokens before it.
    """

    name, kind = "summarization", "summaries"
    auto_class = "AutoModelForSeq2SeqLM"
    peft_task_type = "SEQ_2_SEQ_LM"

    def fit(self, rows: Rows) -> None:
        self.columns = find_columns(self.config.columns, rows, COLUMNS, needed=NEEDED)
        if self.config.template is not None:
            check_template(self.config.template, rows)
        for split, dataset in rows.splits.items():
            for column in (self.columns[role] for role in NEEDED):
                check_texts(rows, split, [column])
                empty = next((i for i, text in enumerate(values(dataset, column)) if not text.strip()), None)
                if empty is not None:
                    raise UserError(
                        f"'{column}' is empty", where=rows.where(split, empty), hint="correct or remove the row"
                    )

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        if not tokenizer.num_special_tokens_to_add(pair=False):
            raise UserError(
                "the tokenizer puts no token at the end of a text, so no summary could end",
                hint="choose a model whose tokenizer does, as those of BART and T5",
            )
        self.tokenizer = tokenizer
        rows = rows.with_format(None)  # columns of it are read when they are looked at
        summaries = rows[self.columns["summary"]]
        template = self.config.template
        documents: Any = rows[self.columns["document"]] if template is None else _Filled(template, rows)
        shared: dict[str, Any] = {"scalars": {}, "cache": cache_folder(self.config.cache)}
        read = tokenize(documents, None, tokenizer, max_length=self.config.max_length, **shared)
        longest = self.config.max_target_length or self.config.max_length
        key = "data.max_target_length"
        written = tokenize(summaries, None, tokenizer, max_length=longest, key=key, **shared)
        target = replace(
            written, ragged={"labels": written.ragged["input_ids"]}, pads={"labels": IGNORED}, side="right"
        )
        cut = f"{target.truncated:,} summaries were longer than {key}={longest} tokens"
        return replace(
            read,
            side="right",  # decoders find nothing at the left of what an encoder has read
            ids=rows[self.columns.get("id", ROW)],
            notes=[cut] if target.truncated else [],
            target=target,
            references=summaries,
        )

    def count(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Loss:
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=shifted(batch["labels"], start_token(model), self.tokenizer.pad_token_id),
            use_cache=False,
        )
        return token_loss(output.logits, batch["labels"])


class _Filled:
    """A template filled with the columns of each row, when it is looked at."""

    def __init__(self, template: str, rows: Any) -> None:
        self.template, self.rows = template, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice) -> list[str]:
        return [filled(self.template, row) for row in self.rows.select(range(len(self))[some])]


def shifted(labels: Tensor, start: int, pad: int) -> Tensor:
    """What a decoder reads where it is to say ``labels`` (n, t): the token before each, ``start`` before the first."""
    before = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return before.masked_fill(before == IGNORED, pad)


def start_token(model: Any) -> int:
    """The token that a model's decoder begins with.

    Raises:
        UserError: its configuration does not say.
    """
    for settings in (model.config, model.generation_config):
        start = getattr(settings, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise UserError(
        "the model's config.json has no decoder_start_token_id, so nothing says what its decoder begins with",
        hint="choose a pretrained encoder-decoder such as BART or T5, or add it there",
    )
