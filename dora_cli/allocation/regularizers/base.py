"""What is added to the loss: given as a closed-form gradient, so no graph is built and nothing is formed twice."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dora_cli.allocation.schedules import Window
from dora_cli.allocation.table import UnitTable
from dora_cli.allocation.verdict import TAKEN, Verdict


class Regularizer:
    """``weight`` times R is added to the loss; subclasses give R and its gradient over groups of one shape."""

    units: ClassVar[frozenset[str]] = frozenset({"components"})
    needs: ClassVar[frozenset[str]] = frozenset()  # what the adapter must provide
    acts: ClassVar[bool] = True

    weight: float

    def attach(self, table: UnitTable) -> None:
        """Learn the number of units at the start."""

    def active(self, step: int, window: Window) -> bool:
        return True

    def value(self, table: UnitTable) -> float:
        """R, without the weight; for the log."""
        raise NotImplementedError

    def after_backward(self, table: UnitTable) -> None:
        """Add weight · ∂R to the gradients; before clipping."""

    def conclude(self, verdict: Verdict) -> None:
        """Where the step is not taken, be as before its ``after_backward``."""

    @property
    def decoupled(self) -> bool:
        """Whether ``after_step`` has anything to do."""
        return False

    def after_step(self, table: UnitTable, learning_rate: float, verdict: Verdict = TAKEN) -> None:
        """Move the parameters, where the regularizer is decoupled from the optimizer and the step is taken."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def add_to_gradients(parameters: Sequence[nn.Parameter], directions: Tensor, scale: float) -> None:
    """``p.grad += scale · direction`` for parameters of one shape; ``directions`` is (m, *shape)."""
    pairs = [(p.grad, d) for p, d in zip(parameters, directions.unbind(0), strict=True) if p.grad is not None]
    if pairs:
        torch._foreach_add_([g for g, _ in pairs], [d for _, d in pairs], alpha=scale)
