"""What the loop, the evaluation and the checkpoints ask of a task."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import Rows


class TaskChoice(Protocol):
    """What tasks read of ``config.schema.DataConfig``."""

    labels: list[str] | None
    metrics: list[str]
    max_length: int
    cache: str | None
    template: str | None
    answer: str | None
    max_new_tokens: int
    max_target_length: int | None
    doc_stride: int | None
    max_answer_length: int | None
    null_answers: bool | None

    @property
    def columns(self) -> Mapping[str, str | None]: ...


class Loss(NamedTuple):
    """A batch's loss, not yet averaged, so that accumulated gradients can be weighted exactly.

    ``total``: the sum over what the loss averages over (rows, or tokens), float32, no dimensions. ``n``: how many those
    were, on the device where the host would have to wait for it. ``outputs``: what the task's scorer reads.
    """

    total: Tensor
    n: int | Tensor
    outputs: Tensor


class Task(Protocol):
    """One kind of task. Order of use: ``fit``, ``model_kwargs``, ``encode``, then ``loss`` and the rest.

    Attributes:
        name: its value of ``data.task``.
        kind: of outputs, which decides what scores them (``evaluation.SCORERS``): ``labels``, ``tags``,
            ``spans``, ``tokens`` or ``summaries``.
        auto_class: transformers' class for the model.
        peft_task_type: the same in PEFT's words, for ``adapter_config.json``; ``None`` where it has none.
        metric_names: what to report; the first chooses the best checkpoint.
        higher_is_better: of the first metric.
    """

    name: str
    kind: str
    auto_class: str
    peft_task_type: str | None
    metric_names: list[str]

    @property
    def higher_is_better(self) -> bool: ...

    def fit(self, rows: Rows) -> None:
        """Find the columns, read the labels, check every row.

        Raises:
            UserError: a missing column, or a row that can't be used, with file and line.
        """

    def model_kwargs(self) -> dict[str, Any]:
        """What the task adds to the model's configuration."""

    def encode(self, rows: Any, tokenizer: Any) -> Encoded:
        """Tokenise one split (a ``datasets.Dataset`` of the rows that were fitted)."""

    def count(self, batch: dict[str, Tensor]) -> int:
        """What the loss of a batch averages over (rows, or tokens), known before the model has run."""

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Loss:
        """Run the model on a batch (on the model's device) and measure it, in float32."""

    def facts(self) -> dict[str, str]:
        """What the plan says of the data beside the numbers of rows, key → text."""


class LabelTask(Task, Protocol):
    """One value a row, a label or a number. ``num_labels``: outputs of the head, 1 for regression."""

    @property
    def num_labels(self) -> int: ...

    def predict(self, outputs: Tensor) -> Tensor:
        """What the model says, one value a row, shape ``(n,)``."""

    def reference(self, batch: dict[str, Tensor]) -> Tensor:
        """What it should say, one value a row, shape ``(n,)``."""

    def decode(self, values: Tensor) -> list[Any]:
        """Predictions or references as they are written into a file."""
