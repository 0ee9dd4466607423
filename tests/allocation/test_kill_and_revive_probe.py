"""DLoRA's revival by gradient, on a step that is skipped."""

from typing import Any

import torch

from dora_cli.adapters.lora import Lora
from dora_cli.allocation.allocators.kill_and_revive import IDLE, KillAndRevive
from dora_cli.allocation.schedules import CubicEarly
from dora_cli.allocation.table import UnitTable


def test_a_gradient_that_is_no_number_revives_nobody(stack: Any) -> None:
    """The module is taken for one without a gradient, not for the one with the largest."""
    _, layers = stack(n=4, width=16, rank=2, part=Lora())
    table, allocator = UnitTable(layers, "modules"), KillAndRevive(choice="probe")
    allocator.attach(table)
    allocator.states[:] = IDLE
    allocator.probing = True
    for layer, value in zip(layers.values(), (None, torch.nan, 1.0, torch.inf), strict=True):
        layer.base_layer.to("meta")  # as where the base is in another process
        layer.b.grad = None if value is None else torch.full_like(layer.b, value)
    allocator.after_backward(table, 9, CubicEarly().window(20))
    assert allocator._next(torch.arange(4), 1).tolist() == [2]
