"""Adapted layers that a model calls one after another with the same input (q, k, v; gate, up), computed as one node.

The first of them to be called computes all and hands out its own output; the others take theirs when they are called.
A forward pass shows which layers are called so. A call that turns out otherwise is computed by itself.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dora_cli.adapters.fused import LowRankLinear, compute_type, low_rank_linears


class Fusable(Protocol):
    """What is asked of a layer."""

    siblings: "Siblings | None"

    def fuses(self, x: Tensor) -> bool:
        """Whether it can be computed as a node for this input."""

    def low_rank_linear(self) -> LowRankLinear: ...

    def dropped(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The adapter's input and its mask; None and None where nothing is dropped."""


def outputs(layers: "Iterable[Fusable]", x: Tensor) -> list[Tensor]:
    """Of layers that read x and drop the same entries of it."""
    layers = list(layers)
    return low_rank_linears(x, [layer.low_rank_linear() for layer in layers], *layers[0].dropped(x))


class Siblings:
    """Layers in the order in which they are called with one input.

    Args:
        layers: at least two; where there is dropout, of one mask group.
    """

    def __init__(self, layers: Iterable[Fusable]) -> None:
        self.layers = list(layers)
        for layer in self.layers:
            layer.siblings = self
        self._input: Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._waiting: dict[int, Tensor] = {}  # position → output

    def forget(self) -> None:
        """Let go of what a pass that ended early has left."""
        self._input, self._waiting = None, {}

    def output(self, layer: Fusable, x: Tensor) -> Tensor:
        """The output of one of them, which can be computed as a node."""
        if x.is_inference():  # such tensors do not say whether they were written into
            return outputs([layer], x)[0]
        position = self.layers.index(layer)
        # As x was when it was read, and with what was on.
        now = x._version, torch.is_grad_enabled(), compute_type(x)
        if self._input is not x or self._state != now or position not in self._waiting:
            able = [p for p, other in enumerate(self.layers) if p == position or (p > position and other.fuses(x))]
            self._waiting = dict(zip(able, outputs([self.layers[p] for p in able], x), strict=True))
            self._state = now
        out = self._waiting.pop(position)
        self._input = x if self._waiting else None
        return out


def join(layers: Mapping[str, Any], run: Callable[[], object]) -> dict[tuple[str, ...], Siblings]:
    """Make siblings of layers of one parent that ``run``, a forward pass, always calls in turn with the same tensor.

    Only of such as sum components; and where their masks differ they stay alone. The pass should be one of training:
    dropout before a layer gives each its own input, which evaluation does not show.

    Returns:
        Names in the order of the calls → their group.
    """
    layers = {name: layer for name, layer in layers.items() if layer.sums_components}
    calls = _calls(layers, run) if len(layers) > 1 else []
    seen: dict[str, set[tuple[str, ...]]] = {}
    for names in calls:
        for name in names:
            seen.setdefault(name, set()).add(names)
    groups = [names for names in dict.fromkeys(calls) if len(names) > 1 and all(len(seen[n]) == 1 for n in names)]
    groups = [g for g in groups if len({layers[name].mask_group for name in g if layers[name].masks is not None}) < 2]
    return {names: Siblings(layers[name] for name in names) for names in groups}


def _calls(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[tuple[str, ...]]:
    """Layers of one parent that were called in turn with the same tensor, in the order of the calls."""
    calls: list[tuple[str, ...]] = []
    last: list[Any] = [None, None]  # what the latest call was given, and its version: kept, or another could look alike

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        version = None if x is None or x.is_inference() else x._version
        same = version is not None and last[0] is x and last[1] == version and name not in calls[-1]
        if same and calls[-1][0].rpartition(".")[0] == name.rpartition(".")[0]:
            calls[-1] += (name,)
        else:
            calls.append((name,))
        last[:] = x, version

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls
