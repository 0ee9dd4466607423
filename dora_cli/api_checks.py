"""What ``adapt`` and its loop refuse: arguments, methods, models and optimizers that can't work there."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dora_cli.adapters.resize import check_state
from dora_cli.allocation.controller import Allocation
from dora_cli.config.compose import Composed
from dora_cli.errors import UserError


def check_given(total_steps: Any, heads: Any, seed: Any) -> None:
    """Refuse what would be taken for something else, or trip far from here."""
    if total_steps is not None:
        check_steps(total_steps)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"seed={seed!r} is no seed", hint="it is a whole number from 0 to 4294967295")
    names = isinstance(heads, Sequence) and not isinstance(heads, str) and all(isinstance(n, str) for n in heads)
    if heads is not None and not names:
        raise UserError(f"heads={heads!r} is no list of names", hint='write heads=["classifier"]')


def check_steps(total_steps: Any) -> None:
    if type(total_steps) is not int or total_steps < 1:
        raise UserError(
            f"total_steps={total_steps!r} is no number of steps",
            hint="it is a whole number of optimizer steps, 1 or more",
        )


def check_needs(composed: Composed, start: Any, probe: Callable[[], float] | None) -> None:
    if start is not None and start.looks:
        raise UserError(
            f"adapter.init={composed.parts['adapter'].init} looks at training data before anything is trained",
            hint="use dora-train for it, or options={'adapter.init': 'default'}",
        )
    if getattr(composed.parts["adapter"], "init_from", None) is not None:
        raise UserError("adapter.init_from is for dora-train", hint="load the weights you start from yourself")
    if composed.parts["schedule"].finds_budget and probe is None:
        raise UserError(
            f"schedule={composed.names['schedule']} asks for the loss on held-out rows",
            hint="give adapt() a probe=… that returns it as a number, always of the same rows",
        )
    if "probe" in composed.parts["importance"].needs and probe is None:
        raise UserError(
            f"importance={composed.names['importance']} asks for the loss on a fixed batch",
            hint="give adapt() a probe=… that returns it as a number",
        )


def check_dense(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse a base whose weights are packed or sharded: nobody has told us how."""
    for name in targets:
        weight: torch.Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.is_floating_point():
            raise UserError(
                f"the weight of '{name}' is a {type(weight).__name__} of {weight.dtype}, not plain numbers",
                hint="for a quantised base use dora-train model.quantization=…",
            )


def check_optimizer(optimizer: Optimizer, allocation: Allocation) -> None:
    """Refuse an optimizer that can't follow units which leave their tensors or grow; once it has state.

    Raises:
        UserError: part of its state is neither a scalar nor a number for each of its parameter's.
    """
    allocator = allocation.allocator
    shrinks = allocation.rebuilds and allocator.compacts and allocator.mode != "static"
    if not shrinks and "grow" not in allocator.verbs:
        return
    try:
        check_state(optimizer)
    except RuntimeError as error:
        raise UserError(
            f"{type(optimizer).__name__} can't train tensors that change their size",
            where=str(error),
            hint="take one that keeps a plain number for each of a parameter's, such as AdamW or SGD with momentum",
        ) from None
