"""Multiple choice: which of several texts goes with a question or a context."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from string import ascii_uppercase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_cli.data.cache import cache_folder
from dora_cli.data.choices import CHOICES, EncodedChoices
from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import ROW, Rows
from dora_cli.data.tasks import higher_is_better
from dora_cli.data.tasks.base import Loss, TaskChoice
from dora_cli.data.tasks.labels import as_text, distinct, is_integer
from dora_cli.data.tasks.text import check_column, check_texts, find_columns, values
from dora_cli.data.tokens import NoRoom, tokenize
from dora_cli.errors import UserError

COLUMNS = {
    "text": ["text"],
    "text_pair": ["text_pair"],
    "choices": ["choices"],
    "label": ["label", "answerKey"],
    "id": ["id", "idx"],
}
FEW = 20  # rows that may all have another choice than the first one right


class MultipleChoice:
    """One of several texts for a row (see ``LabelTask``).

    The model reads every choice with the row's text, and its head gives each a number; the loss is that of a softmax
    over a row's own choices, of which rows may have different numbers. ``text_pair``, where there is one, is put before
    each choice. A text that is too long loses its end, a choice never does.
    """

    name, kind = "multiple_choice", "labels"
    auto_class = "AutoModelForMultipleChoice"
    peft_task_type = None  # PEFT knows none

    def __init__(self, config: TaskChoice) -> None:
        other = [name for name in config.metrics if name not in ("accuracy", "loss")]
        if other:
            raise UserError(
                f"data.metrics: '{other[0]}' has no meaning for data.task={self.name}: a choice is no class",
                hint="choose accuracy",
            )
        self.config = config
        self.metric_names = list(config.metrics) or ["accuracy"]
        self.columns: dict[str, str] = {}
        self.num_labels = 0  # choices of a row, at most
        self.names = distinct([str(name) for name in config.labels]) if config.labels is not None else None
        self._rows = Rows({})
        self._listed: list[str] = []  # one column of lists, or a column a choice

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.metric_names[0])

    def fit(self, rows: Rows) -> None:
        self._rows = rows
        first = next(iter(rows.splits.values())).column_names
        asked = self.config.columns.get("choices") or "choices"
        self._listed = [asked] if asked in first else [name.strip() for name in asked.split(",")]
        for column in self._listed:
            check_column(rows, "choices", column, ", or all with commas between them where each has its own")
        known = {role: column for role, column in self.config.columns.items() if role != "choices"}
        self.columns = find_columns({**known, "choices": self._listed[0]}, rows, COLUMNS)
        counts = set()
        for role in rows.splits:
            check_texts(rows, role, [self.columns[c] for c in ("text", "text_pair") if c in self.columns])
            for i, (choices, names, label) in enumerate(self._read(rows.splits[role])):
                try:
                    counts.add(len(self._checked(choices)))
                    self._index(label, choices, names)
                except ValueError as error:
                    raise UserError(str(error), where=rows.where(role, i), hint="correct or remove the row") from error
        self.num_labels = max(counts | {self.num_labels})  # a later buffer of a stream may have fewer

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        read = list(self._read(rows))
        counts = [len(choices) for choices, _, _ in read]
        labels = torch.tensor([self._index(label, choices, names) for choices, names, label in read])
        texts = list(values(rows, self.columns["text"]))
        befores = [""] * len(read)
        if "text_pair" in self.columns:
            befores = [f"{text} " if text else "" for text in values(rows, self.columns["text_pair"])]
        try:
            flat = tokenize(
                [text for text, n in zip(texts, counts, strict=True) for _ in range(n)],
                [before + choice for before, (choices, _, _) in zip(befores, read, strict=True) for choice in choices],
                tokenizer,
                max_length=self.config.max_length,
                scalars={},
                cache=cache_folder(self.config.cache),
                keep_pairs=True,
            )
        except NoRoom as error:
            place = next(i for i, end in enumerate(accumulate(counts)) if error.row < end)
            number = error.row - sum(counts[:place]) + 1
            what = "with what text_pair puts before it" if "text_pair" in self.columns else "by itself"
            raise UserError(
                f"choice {number} of a row is longer than data.max_length={self.config.max_length} tokens {what}",
                where=self._rows.where_in(rows, place),
                hint="raise data.max_length, or shorten the choice: only the text before the choices is cut",
            ) from error
        encoded = EncodedChoices.grouped(flat, counts, labels)
        encoded.ids = list(values(rows, self.columns.get("id", ROW)))
        if len(read) >= FEW and bool((labels > 0).all()):
            encoded.notes.append(
                f"of {len(read):,} rows none has its first choice right: labels count from 0, "
                "and from 1 with data.labels=[1,2,…]"
            )
        if flat.truncated:
            encoded.notes.append(
                f"{flat.truncated:,} of {sum(counts):,} choices and their text were longer than "
                f"data.max_length={self.config.max_length} tokens: the text lost its end"
            )
        return encoded

    def facts(self) -> dict[str, str]:
        named = f" ({', '.join(self.names)})" if self.names is not None else ""
        return {"choices": f"up to {self.num_labels} a row{named}"}

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Loss:
        """``outputs``: the logits of the choices, shape ``(n, c)``, float32; −∞ where a row has fewer than c."""
        n = self.count(batch)
        inputs = {k: tensor for k, tensor in batch.items() if k not in ("labels", CHOICES)}
        logits = model(**{k: tensor.unflatten(0, (n, -1)) for k, tensor in inputs.items()}).logits.float()
        absent = torch.arange(logits.shape[1], device=logits.device) >= batch[CHOICES][:, None]
        logits = logits.masked_fill(absent, -torch.inf)
        return Loss(F.cross_entropy(logits, batch["labels"], reduction="sum"), n, logits)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=-1)

    def reference(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]

    def decode(self, values: Tensor) -> list[Any]:
        """Numbers of choices from 0, or their names where ``data.labels`` gives them some."""
        return values.tolist() if self.names is None else [self.names[i] for i in values.tolist()]

    def _read(self, dataset: Any) -> Iterator[tuple[list[Any], list[Any] | None, Any]]:
        """Of every row its choices, their names where it has them, and its label; unchecked."""
        columns = [*self._listed, self.columns["label"]]
        for chunk in dataset.select_columns(list(dict.fromkeys(columns))).iter(1000):
            for *found, label in zip(*(chunk[column] for column in columns), strict=True):
                if len(self._listed) == 1:
                    yield *_listed(found[0]), label
                else:
                    while found and not found[-1]:  # a row with fewer choices than there are columns
                        found.pop()
                    yield found, None, label

    def _checked(self, choices: list[Any]) -> list[str]:
        where = f"'{self._listed[0]}'" if len(self._listed) == 1 else ", ".join(f"'{name}'" for name in self._listed)
        if len(choices) < 2:
            raise ValueError(f"{where} must hold a list of two texts or more")
        for i, choice in enumerate(choices, start=1):
            if not isinstance(choice, str) or not choice:
                raise ValueError(f"{where}: choice {i} is {'no text' if choice else 'missing or empty'}")
        if self.names is not None and len(choices) > len(self.names):
            raise ValueError(f"{where}: {len(choices)} choices, and data.labels names {len(self.names)}")
        return choices

    def _index(self, label: Any, choices: Sequence[str], names: Sequence[Any] | None) -> int:
        """The position of the right choice. A label gives it by name where the choices have names (and as a number from
        0 where these are no numbers), else as a number from 0, a letter from A, or the choice's own text.

        Raises:
            ValueError: none, or more than one.
        """
        column = self.columns["label"]
        if label is None or label == "":
            raise ValueError(f"'{column}' is missing")
        known = names if names is not None else self.names
        said = as_text(label, None) or str(label)
        if known is not None:
            found = {i for i, name in enumerate(known) if str(name) == said}
            is_number = isinstance(label, int) and not isinstance(label, bool)
            if is_number and not any(is_integer(str(name)) for name in known):
                found = {label}
        elif isinstance(label, (int, float)):
            found = {int(said)} if is_integer(said) else set()
        else:
            found = {i for i, choice in enumerate(choices) if choice == said}
            found |= {int(said)} if is_integer(said) else set()
            found |= {ascii_uppercase.index(said)} if len(said) == 1 and said in ascii_uppercase else set()
        found = {i for i in found if 0 <= i < len(choices)}
        if len(found) > 1:
            raise ValueError(f"label '{said}' of '{column}' may stand for several choices: name them in data.labels")
        if not found:
            shown = ", ".join(map(str, known)) if known is not None else f"0 to {len(choices) - 1}, a letter or a text"
            if known is None and said == str(len(choices)):
                shown += f"; numbers from 1 need data.labels=[{','.join(str(i + 1) for i in range(len(choices)))}]"
            raise ValueError(f"label '{said}' of '{column}' is none of the {len(choices)} choices ({shown})")
        return found.pop()


def _listed(value: Any) -> tuple[list[Any], list[Any] | None]:
    """The choices of a list, or of ``{"text": […], "label": […]}`` as ARC has them, with their names."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        names = value.get("label")
        return value["text"], names if isinstance(names, list) and len(names) == len(value["text"]) else None
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        names = [item.get("label") for item in value]
        return [item.get("text") for item in value], None if None in names else names
    return (value, None) if isinstance(value, list) else ([], None)
