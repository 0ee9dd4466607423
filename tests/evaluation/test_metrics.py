"""Metrics equal reference implementations, whole or in pieces, and have a value where those have none."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from dora_cli.data.tasks import higher_is_better
from dora_cli.errors import UserError
from dora_cli.evaluation import CLASSIFICATION, METRICS, REGRESSION
from dora_cli.evaluation.metrics import build_metrics


def measure(names, num_labels, predictions, references, piece=1_000_000):
    metrics = build_metrics(names, num_labels)
    for p, r in zip(torch.as_tensor(predictions).split(piece), torch.as_tensor(references).split(piece), strict=True):
        metrics.update(p, r)
    return metrics.compute()


def by_scikit(predictions, references, num_labels):
    kind = {"average": "binary"} if num_labels == 2 else {"average": "macro"}
    kind["zero_division"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "accuracy": sk.accuracy_score(references, predictions),
            "f1": sk.f1_score(references, predictions, **kind),
            "precision": sk.precision_score(references, predictions, **kind),
            "recall": sk.recall_score(references, predictions, **kind),
            "matthews": sk.matthews_corrcoef(references, predictions),
        }


labelings = st.integers(2, 5).flatmap(
    lambda k: st.tuples(
        st.just(k), st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=60)
    )
)


@settings(max_examples=80, deadline=None)
@given(labelings, st.integers(1, 60))
def test_classification_metrics_equal_scikit_learns_in_any_pieces(labeling, piece):
    k, rows = labeling
    predictions, references = map(list, zip(*rows, strict=True))
    expected = by_scikit(predictions, references, k)
    found = measure(list(expected), k, predictions, references, piece)
    assert found == pytest.approx(expected, abs=1e-6)  # counts are divided in float32


def test_balanced_accuracy_is_the_mean_recall():
    predictions, references = [0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 1, 2]
    found = measure(["balanced_accuracy"], 3, predictions, references)["balanced_accuracy"]
    assert found == pytest.approx(sk.balanced_accuracy_score(references, predictions), abs=1e-6)


def test_closed_forms():
    # true positives 3, false positives 1, false negatives 2, true negatives 4
    references = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    predictions = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert measure(["accuracy", "f1", "matthews"], 2, predictions, references) == pytest.approx(
        {"accuracy": 0.7, "f1": 6 / 9, "matthews": (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)}, abs=1e-6
    )
    values = measure(["mse", "mae", "pearson", "spearman"], 1, [1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    assert values == pytest.approx({"mse": 5 / 3, "mae": 1.0, "pearson": 3 / math.sqrt(84), "spearman": 0.5})


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_regression_metrics_equal_scipys_in_any_pieces(piece, shift):
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(300, generator=generator).round(decimals=1) + shift  # with ties
    references = (predictions + torch.randn(300, generator=generator)).round(decimals=1)
    p, r = predictions.double().numpy(), references.double().numpy()
    expected = {
        "pearson": stats.pearsonr(p, r).statistic,
        "spearman": stats.spearmanr(p, r).statistic,
        "mse": np.mean((p - r) ** 2),
        "mae": np.mean(np.abs(p - r)),
    }
    assert measure(list(expected), 1, predictions, references, piece) == pytest.approx(expected, rel=1e-9)


def test_spearman_is_right_for_many_ties_and_many_rows():
    # 70,000 equal values: the sum of their ranks passes 2³¹
    predictions = torch.cat([torch.zeros(70_000), torch.arange(1.0, 1001.0)])
    references = torch.arange(71_000.0).flip(0)
    expected = stats.spearmanr(predictions.numpy(), references.numpy()).statistic
    assert measure(["spearman"], 1, predictions, references)["spearman"] == pytest.approx(expected, rel=1e-9)
    assert measure(["spearman"], 1, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])["spearman"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("reference", [0, 1])
def test_constant_predictions_correlate_with_nothing(rows, reference):
    ones = torch.ones(rows, dtype=torch.int64)
    assert measure(["matthews"], 2, ones, ones * reference) == {"matthews": 0.0}
    assert measure(["matthews"], 2, ones, torch.arange(rows) % 2) == {"matthews": 0.0}
    values = measure(["pearson", "spearman"], 1, ones.float(), torch.arange(rows).float())
    assert values == {"pearson": 0.0, "spearman": 0.0}
    values = measure(["pearson", "spearman"], 1, torch.arange(rows).float(), ones.float())
    assert values == {"pearson": 0.0, "spearman": 0.0}


def test_a_diverged_model_does_not_look_like_one_without_correlation():
    predictions = torch.tensor([1.0, float("nan"), 2.0])
    assert math.isnan(measure(["pearson"], 1, predictions, torch.tensor([1.0, 2.0, 3.0]))["pearson"])


def test_building_and_computing_warn_of_nothing(recwarn):
    measure(list(REGRESSION), 1, [1.0, 1.0], [1.0, 2.0])
    measure(list(CLASSIFICATION), 3, [1, 1], [1, 1])
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("name", METRICS)
def test_the_better_direction_is_known(name):
    num_labels = 1 if name in REGRESSION else 3
    references = torch.tensor([0, 1, 2, 0, 1, 2])
    right, wrong = references, torch.tensor([1, 2, 0, 2, 0, 1])
    if num_labels == 1:
        references, right, wrong = references.float(), right.float(), wrong.float()
    best, worst = (measure([name], num_labels, p, references)[name] for p in (right, wrong))
    assert (best > worst) == higher_is_better(name)


def test_loss_is_no_metric_to_compute():
    assert list(build_metrics(["loss", "accuracy"], 2).metrics) == ["accuracy"]
    assert not higher_is_better("loss")


@pytest.mark.parametrize(
    ("name", "num_labels", "message"),
    [
        ("accurracy", 2, "unknown data.metrics 'accurracy'"),
        ("pearson", 2, "for regression"),
        ("f1", 1, "for classification"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(name, num_labels, message):
    with pytest.raises(UserError, match=message) as caught:
        build_metrics([name], num_labels)
    assert "accuracy" in caught.value.hint if num_labels == 2 else "pearson" in caught.value.hint
