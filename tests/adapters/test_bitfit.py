"""BitFit: which parameters train, and the refusal of a model that has no bias."""

import pytest
from torch import nn

from dora_cli.adapters.bitfit import Bitfit
from dora_cli.errors import UserError


def test_exactly_the_biases_train_those_of_norms_included() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2, bias=False), nn.Embedding(3, 2))
    model.requires_grad_(False)
    Bitfit().unfreeze(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.bias", "1.bias"}


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(UserError, match="has none"):
        Bitfit().unfreeze(nn.Sequential(nn.Linear(4, 4, bias=False)))


def test_it_has_no_budget_and_wraps_nothing() -> None:
    part = Bitfit()
    assert (part.budgeted, part.wraps, part.export) == (False, False, "full")
