"""The cloud's side: the frozen base model, run as the device asks, which in turn is asked for what adapters add."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_cli.adapters.base import AdapterLayer
from dora_cli.adapters.fused import compute_type
from dora_cli.adapters.inject import locate
from dora_cli.modes import autocast
from dora_cli.training.apart.wire import (
    BACKWARD,
    FORWARD,
    HIDDEN,
    RANDOM,
    Link,
    Message,
    random_state,
    set_random_state,
)

ON, TRAINS = 1, 2  # of a module's state, added up


class Cloud:
    """The base model without its head, whose adapted modules ask the device.

    Args:
        body: frozen, on ``link.place``; it is changed.
        dtype: what its passes are cast to.
    """

    def __init__(self, body: nn.Module, link: Link, dtype: torch.dtype | None) -> None:
        self.body, self.link, self.dtype = body, link, dtype
        self.reads: list[str] = []  # names of what the head reads of the body's output
        self.states: list[int] = []  # of the adapted modules, by number
        self.calls = 0  # of this pass, that take part in its backward pass
        self.graph: list[Tensor] = []  # what the last pass has sent, with its graph

    def serve(self) -> int:
        """Do as the device says until it ends the run. Returns the exit code that it ends with."""
        while True:
            message = self.link.receive()
            self.link.training = message.rest.get("training", self.link.training)
            if message.word == "end":
                return int(message.rest["code"])
            getattr(self, f"_{message.word}")(message)

    # ---- what the device asks for ----------------------------------------------------------------------------------
    def _begin(self, message: Message) -> None:
        """Names: of the modules that have adapters, of those that are the device's own altogether, and of outputs."""
        texts = (bytes(message.tensors[name].tolist()).decode() for name in ("adapted", "own", "reads"))
        adapted, own, self.reads = (text.split() for text in texts)
        for number, name in enumerate([*adapted, *own]):
            parent, child = locate(self.body, name)
            kind = Adapted if number < len(adapted) else Elsewhere
            setattr(parent, child, kind(getattr(parent, child), self, number))

    def _states(self, message: Message) -> None:
        self.states = message.tensors["states"].tolist()

    def _forward(self, message: Message) -> None:
        inputs, rest, place = message.tensors, message.rest, self.link.place
        state = inputs.pop(RANDOM, None)
        if state is not None:  # dropout goes on where the device's own has come to
            set_random_state(state, place)
        self.graph, self.calls = [], 0
        self.body.train(state is not None)
        with torch.set_grad_enabled(rest["training"]), autocast(place, self.dtype):
            out = self.body(**inputs, **rest["plain"])
        found = {name: out[name] for name in self.reads}
        self.graph = list(found.values()) if rest["training"] else []
        moved = {} if state is None else {RANDOM: random_state(place)}
        self.link.send("outputs", found | moved, kind=HIDDEN)

    def _backward(self, message: Message) -> None:
        pairs = [(self.graph[int(at)], grad) for at, grad in message.tensors.items()]
        pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
        self.graph = []
        if pairs:
            outs, grads = zip(*pairs, strict=True)
            torch.autograd.backward(list(outs), list(grads))
        self.link.send("done")


class Adapted(AdapterLayer):
    """A base layer to whose output the device's adapter adds, while it is on."""

    def __init__(self, base: nn.Module, cloud: Cloud, number: int) -> None:
        super().__init__(base)
        self.cloud, self.number = cloud, number

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        state = self.cloud.states[self.number]
        if not state & ON:
            return out
        return out + _ask(self.cloud, self.number, x.to(compute_type(x)), out, bool(state & TRAINS), FORWARD)


class Elsewhere(nn.Module):
    """A module that the device has, and trains; what stands here only says how large its output is."""

    def __init__(self, base: nn.Module, cloud: Cloud, number: int) -> None:
        super().__init__()
        self.base_layer, self.cloud, self.number = base, cloud, number

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.base_layer(x)
        return _ask(self.cloud, self.number, x, out, True, HIDDEN)


def _ask(cloud: Cloud, number: int, x: Tensor, like: Tensor, trains: bool, kind: str) -> Tensor:
    # A tensor that wants a gradient, and gets none: what trains is the device's, and must be told of its gradient.
    anchor = torch.zeros((), requires_grad=trains)
    out: Tensor = _Asked.apply(x, anchor, cloud, number, like.detach(), kind, torch.is_grad_enabled())
    return out


class _Asked(torch.autograd.Function):
    """A module's answer for x; on the way back the gradient of one goes for that of the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, cloud: Cloud, number: int, like: Tensor, kind: str, grad: bool
    ) -> Tensor:
        wants = grad and x.requires_grad
        graph = wants or (grad and anchor.requires_grad)
        dtype = str(like.dtype).removeprefix("torch.")
        cloud.link.send("update", {"x": x}, kind=kind, module=number, dtype=dtype, wants=wants, graph=graph)
        ctx.cloud, ctx.call, ctx.wants = cloud, cloud.calls, wants
        ctx.kind, ctx.like = BACKWARD if kind == FORWARD else kind, torch.empty_like(x, device="meta")
        cloud.calls += graph
        return cloud.link.answered(like, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        link = ctx.cloud.link
        link.send("gradient", {"y": grad}, kind=ctx.kind, call=ctx.call)
        return (link.answered(ctx.like, ctx.kind) if ctx.wants else None), *[None] * 6


def told(names: Iterable[str]) -> Tensor:
    """Names as bytes, as ``Cloud`` reads them."""
    return torch.tensor(list(" ".join(names).encode()), dtype=torch.uint8)
