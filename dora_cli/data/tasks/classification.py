"""Classification of a text or a pair of texts."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import Rows
from dora_cli.data.tasks import higher_is_better
from dora_cli.data.tasks.base import Loss, TaskChoice
from dora_cli.data.tasks.labels import as_text, class_names, distinct, in_order, positions
from dora_cli.data.tasks.text import check_texts, encode_texts, find_columns, values
from dora_cli.errors import UserError


class Classification:
    """One of several labels for a row (see ``LabelTask``).

    The labels are ``config.labels``, else those of the data: the names of a ``ClassLabel`` column, or the different
    values in train (numbers in their order, words by alphabet). With ``config.labels``, data may also give a label by
    its position, as the GLUE files do.
    """

    name, kind = "classification", "labels"
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"

    def __init__(self, config: TaskChoice) -> None:
        self.config = config
        self.metric_names = list(config.metrics) or ["accuracy"]
        self.columns: dict[str, str] = {}
        self.labels: list[str] = []
        self._positions: dict[str, int] = {}

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.metric_names[0])

    def fit(self, rows: Rows) -> None:
        self.columns = find_columns(self.config.columns, rows)
        self.labels = self._read_labels(rows)
        named = self.config.labels is not None or any(
            class_names(dataset, self.columns["label"]) for dataset in rows.splits.values()
        )
        self._positions = positions(self.labels, numbered=named)
        for role, dataset in rows.splits.items():
            check_texts(rows, role, [self.columns[c] for c in ("text", "text_pair") if c in self.columns])
            names = class_names(dataset, self.columns["label"])
            for i, value in enumerate(values(dataset, self.columns["label"])):
                if self._index(value, names) is None:
                    raise self._outside(value, rows, role, i)

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": self.num_labels,
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        column = self.columns["label"]
        names = class_names(rows, column)
        labels = torch.tensor([self._index(value, names) for value in values(rows, column)])
        return encode_texts(rows, self.columns, tokenizer, self.config, scalars={"labels": labels})

    def facts(self) -> dict[str, str]:
        return {"labels": ", ".join(self.labels)}

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Loss:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()  # (n, num_labels)
        return Loss(F.cross_entropy(logits, batch["labels"], reduction="sum"), self.count(batch), logits)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=-1)

    def reference(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]

    def decode(self, values: Tensor) -> list[str]:
        return [self.labels[i] for i in values.tolist()]

    def _read_labels(self, rows: Rows) -> list[str]:
        if self.config.labels is not None:
            return distinct([str(label) for label in self.config.labels])
        role = "train" if "train" in rows.splits else next(iter(rows.splits))
        column = self.columns["label"]
        names = class_names(rows.splits[role], column)
        if names is not None:
            return distinct(names)
        if rows.stream is not None:
            raise UserError(
                "the labels can't be read from data that is streamed",
                where=f"column '{column}' of {rows.source}",
                hint="list them in data.labels, for example data.labels=[negative,positive]",
            )
        found: set[str] = set()
        count = 0
        for i, value in enumerate(values(rows.splits[role], column)):
            count += 1
            text = as_text(value, None)
            if text is None:
                raise self._outside(value, rows, role, i)
            found.add(text)
        if len(found) > 100 and len(found) > count / 2:
            raise UserError(
                f"column '{column}' has {len(found)} different values in {count} rows: that is no label",
                where=f"split '{role}' of {rows.source}",
                hint="choose the label's column with data.columns.label=NAME, or data.task=regression for numbers",
            )
        if len(found) < 2:
            raise UserError(
                f"every row has the same label '{found.pop()}'",
                where=f"column '{column}' of split '{role}' in {rows.source}",
                hint="choose the label's column with data.columns.label=NAME, or list all labels in data.labels",
            )
        return in_order(found)

    def _index(self, value: Any, names: Sequence[str] | None) -> int | None:
        """The position of a row's label in ``labels``, or ``None``."""
        index = self._positions.get(as_text(value, names) or "")
        return self._positions.get(str(value)) if index is None and names is not None else index

    def _outside(self, value: Any, rows: Rows, role: str, index: int) -> UserError:
        where = rows.where(role, index)
        column = self.columns["label"]
        if value is None or value == "":
            return UserError(f"'{column}' is missing", where=where, hint="correct or remove the row")
        if not isinstance(value, (str, int, float)):
            return UserError(f"'{column}' is no word or number ({type(value).__name__})", where=where)
        if isinstance(value, float) and not value.is_integer():
            return UserError(
                f"label {value} is no whole number", where=where, hint="for numbers set data.task=regression"
            )
        shown = ", ".join(self.labels[:10]) + (", …" if len(self.labels) > 10 else "")
        hint = "correct the row, or list all labels in data.labels"
        if value == -1:
            hint = "-1 stands for an unknown label, as in GLUE's test splits: such a split can't be evaluated"
        return UserError(f"label '{value}' is none of the labels ({shown})", where=where, hint=hint)
