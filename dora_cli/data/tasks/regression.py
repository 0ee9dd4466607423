"""Regression: a number for a text or a pair of texts."""

from typing import Any

import torch
from torch import Tensor

from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import Rows
from dora_cli.data.tasks import higher_is_better
from dora_cli.data.tasks.base import Loss, TaskChoice
from dora_cli.data.tasks.text import check_texts, encode_texts, find_columns, values
from dora_cli.errors import UserError

LARGEST = torch.finfo(torch.float32).max


class Regression:
    """One number for a row, by squared error (see ``LabelTask``)."""

    name, kind = "regression", "labels"
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    num_labels = 1

    def __init__(self, config: TaskChoice) -> None:
        if config.labels is not None:
            raise UserError("data.labels has no meaning for data.task=regression", hint="set data.labels=null")
        self.config = config
        self.metric_names = list(config.metrics) or ["pearson", "spearman"]
        self.columns: dict[str, str] = {}

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.metric_names[0])

    def fit(self, rows: Rows) -> None:
        self.columns = find_columns(self.config.columns, rows)
        column = self.columns["label"]
        for role, dataset in rows.splits.items():
            check_texts(rows, role, [self.columns[c] for c in ("text", "text_pair") if c in self.columns])
            for i, value in enumerate(values(dataset, column)):
                if _number(value) is None:
                    problem = "is missing" if value in (None, "") else f"'{value}' is no finite number of 32 bits"
                    raise UserError(
                        f"'{column}' {problem}",
                        where=rows.where(role, i),
                        hint="correct or remove the row; for words as labels set data.task=classification",
                    )

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        labels = torch.tensor([_number(value) for value in values(rows, self.columns["label"])], dtype=torch.float32)
        return encode_texts(rows, self.columns, tokenizer, self.config, scalars={"labels": labels})

    def facts(self) -> dict[str, str]:
        return {}

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Loss:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        predicted = model(**inputs).logits.float().squeeze(-1)  # (n,)
        return Loss((predicted - batch["labels"]).square().sum(), self.count(batch), predicted)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs

    def reference(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]

    def decode(self, values: Tensor) -> list[float]:
        return values.tolist()


def _number(value: Any) -> float | None:
    """A number that float32 can hold, also where it is written as text, as csv gives it; ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) <= LARGEST else None  # false for NaN as well
