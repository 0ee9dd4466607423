"""States that a model's forward pass runs in for a while: evaluation mode, lower precision."""

from collections.abc import Iterator
from contextlib import contextmanager

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


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Matrix products in ``dtype`` within; None leaves everything as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
