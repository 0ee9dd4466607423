"""Shared by all rooms: small adapted stacks of linear layers, and one thread, since tiny tensors gain from no more."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dora_cli.adapters.base import AdapterLayer, LowRankPart
from dora_cli.adapters.components import Components
from dora_cli.adapters.inject import inject

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

Stack = tuple[nn.Module, dict[str, AdapterLayer]]


@pytest.fixture
def stack() -> Callable[..., Stack]:
    """Build ``n`` linear layers with tanh between, adapted, c, b shaken so that nothing is zero by accident."""

    def make(
        n: int = 4,
        width: int = 16,
        rank: int = 6,
        part: LowRankPart | None = None,
        *,
        seed: int = 0,
        shake: bool = True,
    ) -> Stack:
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for _ in range(n):
            modules += [nn.Linear(width, width), nn.Tanh()]
        model = nn.Sequential(*modules)
        model.requires_grad_(False)
        layers = inject(model, [str(2 * i) for i in range(n)], part or Components(), [rank] * n)
        if shake:
            with torch.no_grad():
                for layer in layers.values():
                    for parameter in layer.adapter_parameters().values():
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        return model, layers

    return make
