"""What DLoRA's training modules send and compute, by their formulas."""

import torch
from torch import nn

from dora_cli.adapters.inject import inject
from dora_cli.adapters.lora import Lora
from dora_cli.allocation.allocators.kill_and_revive import flops, traffic


def test_traffic_and_work_are_the_formulas_over_the_modules_that_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 6), nn.Linear(6, 6))
    layers = list(inject(model, ["0", "1", "2"], Lora(), [2, 3, 4]).values())
    assert traffic(layers, [True, False, True], tokens=10) == 10 * 2 * ((8 + 24) + (6 + 6))
    assert traffic(layers, [False] * 3) == 0
    assert flops(layers, [True, True, False]) == 3 * 2 * (2 * (8 + 24) + 3 * (24 + 6))
