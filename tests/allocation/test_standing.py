"""What an event's record says of how the units stood, against what the table itself says."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dora_cli.allocation.allocators.prune import Prune
from dora_cli.allocation.budget import Target
from dora_cli.allocation.controller import Allocation
from dora_cli.allocation.importance.base import Importance
from dora_cli.allocation.regularizers.none import NoRegularizer
from dora_cli.allocation.schedules import Linear


class Fixed(Importance):
    """Scores that a test sets."""

    values: torch.Tensor

    def scores(self, table: Any, probe: Any) -> torch.Tensor:
        return self.values


def test_an_event_says_what_went_what_nearly_went_and_how_scores_are_spread(stack: Callable[..., Any]) -> None:
    _, layers = stack(n=3, rank=4)
    fixed = Fixed()
    fixed.values = torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6, 5, 10, torch.nan, torch.inf])
    allocation = Allocation(
        layers,
        schedule=Linear(start=1, end=3),
        importance=fixed,
        allocator=Prune(interval=1, revive=False),
        regularizer=NoRegularizer(),
        total_steps=4,
        target=Target(4, by_cost=False),
    )
    optimizer = torch.optim.SGD([p for la in layers.values() for p in la.adapter_parameters().values()], lr=0.0)
    events = [event for t in range(1, 5) if (event := allocation.after_step(t, optimizer)) is not None]
    assert [event["alive"] for event in events] == [12, 8, 4]
    first, second, last = (event["standing"] for event in events)
    assert first["lost"] == [] and first["highest_lost"] is None and first["lowest_kept"] == 1.0
    np.testing.assert_allclose(first["quantiles"], np.quantile(np.arange(1.0, 11.0), np.linspace(0, 1, 21)), rtol=1e-5)
    # Eight are kept: inf, 10, 9, 8, 7, 6, 5, 4; what is no number is the worst, and is named nowhere.
    assert second["lost"] == [["2", 0, 3.0], ["0", 2, 2.0], ["0", 0, 1.0]]
    assert second["nearly_lost"][:2] == [["2", 2, 4.0], ["4", 0, 5.0]]
    assert (second["lowest_kept"], second["highest_lost"]) == (4.0, 3.0)
    assert [score for _, _, score in last["lost"]] == [7.0, 6.0, 5.0, 4.0]
    assert last["quantiles"][0] == 4.0, "what was dropped before is not ranked"
