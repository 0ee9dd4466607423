"""Metrics that are updated batch by batch; each function builds one of ``dora_cli.evaluation.METRICS``.

With two labels ``f1``, ``precision`` and ``recall`` are those of label 1, with more labels the mean over labels.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_cli.errors import UserError
from dora_cli.evaluation import CLASSIFICATION, METRICS, REGRESSION
from dora_cli.registry import load


class MetricSet:
    """Several metrics of one evaluation.

    A correlation without a value, since predictions or references do not vary, counts as 0, as GLUE's own evaluation
    has it; a prediction that is not finite makes it nan.
    """

    def __init__(self, metrics: dict[str, Any]) -> None:
        self.metrics = metrics
        for metric in metrics.values():
            # What several processes have seen is put together before it comes here.
            metric.distributed_available_fn = lambda: False
        self.finite = True

    def update(self, predictions: Tensor, references: Tensor) -> None:
        """Take in a batch; both have shape ``(n,)``: label numbers, or values."""
        predictions, references = predictions.detach().cpu(), references.detach().cpu()
        if predictions.is_floating_point():
            predictions, references = predictions.double(), references.double()
            self.finite = self.finite and bool(predictions.isfinite().all())
        for metric in self.metrics.values():
            metric.update(predictions, references)

    def compute(self) -> dict[str, float]:
        """The metrics of everything taken in, by name."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of correlations without a value, see above
            values = {name: metric.compute() for name, metric in self.metrics.items()}
        return {name: self._number(value) for name, value in values.items()}

    def _number(self, value: Tensor) -> float:
        # Counts are divided in float32: what lies beyond its digits is no information.
        number = float(value) if value.dtype == torch.float64 else round(float(value), 7)
        return 0.0 if math.isnan(number) and self.finite else number


def build_metrics(names: Sequence[str], num_labels: int) -> MetricSet:
    """Fresh metrics for one evaluation.

    Args:
        names: keys of ``METRICS``; also ``loss``, which every evaluation reports anyway.
        num_labels: labels of a classification; 1 for regression.

    Raises:
        UserError: an unknown metric, or one of the other kind of task.
    """
    mine = REGRESSION if num_labels == 1 else CLASSIFICATION
    names = [name for name in names if name != "loss"]
    for name in names:
        if name in METRICS and name not in mine:
            kind = "classification" if num_labels == 1 else "regression"
            raise UserError(f"data.metrics: '{name}' is for {kind}", hint=f"choose from {', '.join(mine)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Spearman keeps one number a row, and says so
        return MetricSet({name: load(mine, name, key="data.metrics")(num_labels) for name in names})


def accuracy(num_labels: int) -> Any:
    """The share of rows whose label is right."""
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(num_labels, average="micro")


def balanced_accuracy(num_labels: int) -> Any:
    """The mean over labels of the share of their rows that is right."""
    from torchmetrics.classification import MulticlassRecall

    return MulticlassRecall(num_labels, average="macro")


def f1(num_labels: int) -> Any:
    """The harmonic mean of precision and recall."""
    from torchmetrics.classification import BinaryF1Score, MulticlassF1Score

    return BinaryF1Score() if num_labels == 2 else MulticlassF1Score(num_labels, average="macro")


def precision(num_labels: int) -> Any:
    """Of the rows predicted to have a label, the share that has it."""
    from torchmetrics.classification import BinaryPrecision, MulticlassPrecision

    return BinaryPrecision() if num_labels == 2 else MulticlassPrecision(num_labels, average="macro")


def recall(num_labels: int) -> Any:
    """Of the rows that have a label, the share predicted to have it."""
    from torchmetrics.classification import BinaryRecall, MulticlassRecall

    return BinaryRecall() if num_labels == 2 else MulticlassRecall(num_labels, average="macro")


def matthews(num_labels: int) -> Any:
    """Matthews' correlation of two labelings; 0 where either does not vary."""
    from torchmetrics.classification import MulticlassMatthewsCorrCoef

    class Matthews(MulticlassMatthewsCorrCoef):
        """torchmetrics gives ±1 where both are constant, scikit-learn and GLUE 0."""

        def compute(self) -> Tensor:
            confusion = self.confmat
            varied = (confusion.sum(0) > 0).sum() > 1 and (confusion.sum(1) > 0).sum() > 1
            return super().compute() if varied else torch.tensor(0.0)

    return Matthews(num_labels)


def pearson(num_labels: int) -> Any:
    """Linear correlation."""
    from torchmetrics.regression import PearsonCorrCoef

    return PearsonCorrCoef().set_dtype(torch.float64)  # float32 sums lose digits over many rows


def spearman(num_labels: int) -> Any:
    """Correlation of ranks, ties at their mean rank. Keeps one number a row."""
    from torchmetrics.regression import SpearmanCorrCoef

    class Spearman(SpearmanCorrCoef):
        """torchmetrics sums ranks in int32 and shifts the result by an ε: wrong for many ties, and for few rows."""

        def compute(self) -> Tensor:
            ranks = [_ranks(torch.cat(list(values))) for values in (self.preds, self.target)]
            return torch.corrcoef(torch.stack(ranks))[0, 1]

    return Spearman().set_dtype(torch.float64)


def _ranks(values: Tensor) -> Tensor:
    """The rank of every value from 1, equal values at the mean of their ranks; shape ``(n,)``, float64."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[group]


def mse(num_labels: int) -> Any:
    """Mean squared error."""
    from torchmetrics.regression import MeanSquaredError

    return MeanSquaredError().set_dtype(torch.float64)


def mae(num_labels: int) -> Any:
    """Mean absolute error."""
    from torchmetrics.regression import MeanAbsoluteError

    return MeanAbsoluteError().set_dtype(torch.float64)
