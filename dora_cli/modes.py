"""States that a model's forward pass runs in for a while: evaluation, a rehearsal of training, lower precision."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def rehearsing(model: nn.Module) -> Iterator[None]:
    """Training mode within; then modes, buffers and random numbers are again what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with evaluating(model), same_random_numbers():
            model.train()
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Afterwards the global generators stand where they stood."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Matrix products in ``dtype`` within; None leaves everything as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
