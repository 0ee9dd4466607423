"""Extractive question answering: where in a context the answer stands, or that it holds none."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_cli.data.cache import cache_folder, cached
from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks import higher_is_better
from dora_cli.data.tasks.answers import Answers, read_answers
from dora_cli.data.tasks.base import Loss, TaskChoice
from dora_cli.data.tasks.conversations import BadRow
from dora_cli.data.tasks.text import find_columns
from dora_cli.data.token_rows import digest_of
from dora_cli.data.tokens import CACHED_FROM
from dora_cli.data.windows import SCALARS, Asked, Unfit, cut_windows
from dora_cli.errors import UserError

# Role → the names under which a column is looked for.
ROLES = {
    "question": ("question",),
    "context": ("context",),
    "answers": ("answers", "answer"),
    "answer_start": ("answer_start",),
    "id": ("id",),
}
NEEDED = ("question", "context", "answers")
FORMAT = 1  # of what is cached: raise it when the same rows become other windows


class Question(NamedTuple):
    """What an evaluation asks of a row: ``text`` is what was predicted, ``references`` every answer that is right."""

    id: Any
    text: str
    span: tuple[int, int]  # characters [start, end) of the text in the context
    references: list[str]


@dataclass(frozen=True)
class AskedRows:
    """The rows of a split, and where in its context each token of a row stands (see ``cut_windows``).

    Every window refers to them (``Encoded.references``), so they live as long as the windows do.
    """

    rows: Any
    columns: dict[str, str]
    char_starts: Tensor
    char_ends: Tensor
    char_offsets: Tensor

    def questions(self, spans: Mapping[int, tuple[int, int]]) -> Iterator[Question]:
        """Rows with what was predicted, in the order in which they are asked for.

        Args:
            spans: number of a row in the split → first and last token of an answer, counted in its context.
        """
        numbers = list(spans)
        for at in range(0, len(numbers), 500):
            chunk = numbers[at : at + 500]
            for number, row in zip(chunk, _read(self.rows.select(chunk), self.columns), strict=True):
                begin = int(self.char_offsets[number])
                first, last = (begin + token for token in spans[number])
                start, end = int(self.char_starts[first]), int(self.char_ends[last])
                context = row[self.columns["context"]]
                start += len(context[start:end]) - len(context[start:end].lstrip())
                text = context[start:end].rstrip()
                name = row[self.columns.get("id", ROW)]
                yield Question(name, text, (start, start + len(text)), _answers(row, self.columns).texts)


class QuestionAnswering:
    """Start and end of an answer in the context of a question (see ``Task``).

    A row becomes one window or several; each learns the first and the last token of the answer, or where it does not
    hold the answer whole, twice the position that stands for none: the tokenizer's CLS token, else the first token.
    """

    name, kind = "qa", "spans"
    auto_class = "AutoModelForQuestionAnswering"
    peft_task_type = None  # PEFT's class for questions (0.21) does not hand on token_type_ids

    def __init__(self, config: TaskChoice) -> None:
        if config.labels is not None:
            raise UserError("data.labels has no meaning for data.task=qa", hint="set data.labels=null")
        self.config = config
        self.metric_names = list(config.metrics) or ["f1", "exact"]
        self.columns: dict[str, str] = {}
        self.max_answer_length = config.max_answer_length or 30
        self.overlap = config.max_length // 3 if config.doc_stride is None else config.doc_stride
        self.null_answers = bool(config.null_answers)
        self._rows = Rows({})
        self._facts: dict[str, str] = {}

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.metric_names[0])

    def fit(self, rows: Rows) -> None:
        self._rows, self.columns = rows, find_columns(self.config.columns, rows, ROLES, needed=NEEDED)
        empty, guessed = {}, {}
        for role, dataset in rows.splits.items():
            counts = [0, 0]
            for i, row in enumerate(_read(dataset, self.columns)):
                try:
                    answers = self._check(row)
                except BadRow as error:
                    raise UserError(str(error), where=rows.where(role, i), hint="correct or remove the row") from error
                counts[0] += answers.span is None
                counts[1] += answers.guessed
            empty[role], guessed[role] = counts
        if self.config.null_answers is None and rows.stream is not None:
            raise UserError(
                "whether a context may hold no answer can't be read from data that is streamed",
                where=f"column '{self.columns['answers']}' of {rows.source}",
                hint="say it with data.null_answers=true or false",
            )
        if self.config.null_answers is None:
            self.null_answers = any(empty.values())
        self._facts = {} if not any(empty.values()) else {"no answer": _counted(empty)}
        if any(guessed.values()):
            self._facts["guessed"] = (
                f"{_counted(guessed)} answers without a start occur several times: the first is taken"
            )

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 2}  # of a token: that an answer starts there, that it ends there

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        """Windows as rows. ``ids`` and ``places`` are those of the row that each is a window of."""
        columns = [self.columns[role] for role in ROLES if role in self.columns and role != "id"]
        settings = {
            "task": [self.name, FORMAT, *columns],
            "max_length": self.config.max_length,
            "overlap": self.overlap,
            "names": tokenizer.model_input_names,
        }
        key, characters = digest_of(rows, columns, tokenizer, settings)
        folder = cache_folder(self.config.cache) if key is not None and characters >= CACHED_FROM else None
        made = cached(folder, lambda: key or "", lambda: [self._windows(rows, tokenizer)])
        chars = {name: made[name] for name in ("char_starts", "char_ends", "char_offsets")}
        pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        pads = {name: pad for name, pad in pads.items() if name in made}
        places = made["row"].tolist()
        named = rows.with_format(None)[self.columns.get("id", ROW)][:]
        return Encoded(
            ragged={name: made[name] for name in pads},
            offsets=made["offsets"],
            scalars={name: made[name] for name in SCALARS},
            pads=pads,
            side=tokenizer.padding_side,
            ids=[named[place] for place in places],
            places=places,
            references=[AskedRows(rows, self.columns, **chars)] * len(places),
            windows_of=len(rows),
        )

    def facts(self) -> dict[str, str]:
        return self._facts

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["row"])

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Loss:
        """The mean of the cross-entropies of start and end. ``outputs``: (n, s, 2) their logits, −∞ at padding."""
        inputs = ("input_ids", "token_type_ids", "attention_mask")
        output = model(**{name: batch[name] for name in inputs if name in batch})
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1).float()  # (n, s, 2)
        logits = logits.masked_fill(batch["attention_mask"][..., None] == 0, -torch.inf)
        wanted = torch.stack([batch["start"], batch["end"]], dim=-1) + padding_before(batch)[:, None]  # (n, 2)
        return Loss(F.cross_entropy(logits, wanted, reduction="sum") / 2, self.count(batch), logits)

    def _windows(self, rows: Any, tokenizer: Any) -> dict[str, Tensor]:
        columns = self.columns
        # The start of a question says nothing; some of SQuAD's begin with many spaces.
        asked = (
            Asked(row[columns["question"]].lstrip(), row[columns["context"]], _answers(row, columns).span)
            for row in _read(rows, columns)
        )
        types = "token_type_ids" in tokenizer.model_input_names
        try:
            return cut_windows(asked, tokenizer, max_length=self.config.max_length, overlap=self.overlap, types=types)
        except Unfit as error:
            raise UserError(error.message, where=self._rows.where_in(rows, error.row), hint=error.hint) from error

    def _check(self, row: Mapping[str, Any]) -> Answers:
        for role in ("question", "context"):
            text, column = row[self.columns[role]], self.columns[role]
            if not isinstance(text, str):
                raise BadRow(f"'{column}' is {'missing' if text is None else f'no text ({type(text).__name__})'}")
            if not text.strip():
                raise BadRow(f"'{column}' is empty")
        try:
            answers = _answers(row, self.columns)
        except BadRow as error:
            raise BadRow(f"'{self.columns['answers']}' {error}") from error
        if answers.span is None and self.config.null_answers is False:
            raise BadRow(
                f"'{self.columns['answers']}' holds no answer, and data.null_answers=false says that all rows do"
            )
        return answers


def _read(dataset: Any, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Rows as Python objects, without the columns that nobody asked for."""
    for chunk in dataset.with_format(None).select_columns([*dict.fromkeys([*columns.values(), ROW])]).iter(500):
        for i in range(len(chunk[ROW])):
            yield {name: values[i] for name, values in chunk.items()}


def _answers(row: Mapping[str, Any], columns: Mapping[str, str]) -> Answers:
    start = row[columns["answer_start"]] if "answer_start" in columns else None
    return read_answers(row[columns["answers"]], start, row[columns["context"]])


def padding_before(batch: dict[str, Tensor]) -> Tensor:
    """How far the tokens of every window are moved by padding on their left, shape ``(n,)``."""
    return (batch["attention_mask"].cumsum(1) == 0).sum(1)


def _counted(counts: Mapping[str, int]) -> str:
    """Numbers of rows by split."""
    return ", ".join(f"{n:,} of {role}" for role, n in counts.items())
