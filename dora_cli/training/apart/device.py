"""The device's side: the loop's model, whose base model runs in the cloud and asks back for what adapters add.

The device never decides an order. Within a pass it answers what the cloud asks, in whichever order that comes, so that
neither waits for the other's turn.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_cli.adapters.base import AdapterLayer
from dora_cli.errors import UserError
from dora_cli.training.apart.cloud import ON, TRAINS, told
from dora_cli.training.apart.seam import Seam, first_loss
from dora_cli.training.apart.wire import (
    HIDDEN,
    INPUTS,
    RANDOM,
    Link,
    Message,
    Traffic,
    random_state,
    set_random_state,
)
from dora_cli.training.passes import ROUNDING
from dora_cli.training.setup import Session


def send_away(session: Session, link: Link, seam: Seam) -> None:
    """Let the cloud run the session's base model from here on, and let go of its weights.

    Raises:
        UserError: the cloud holds another base.
    """
    body = _Body(session.model, link, seam)
    link.send("begin", {"adapted": told(seam.adapted), "own": told(seam.own), "reads": told(seam.needed)})
    _release(session.model, seam)
    session.model.base_model.forward = body.forward  # type: ignore[union-attr]
    with torch.no_grad():
        loss = float(first_loss(session))
    if not abs(loss - seam.first_loss) <= ROUNDING[session.autocast_dtype] * max(1.0, abs(seam.first_loss)):
        raise UserError(
            "train.base=apart: the two processes do not hold the same base model",
            where=f"the first row has a loss of {seam.first_loss:.6g} with process 0's, {loss:.6g} with process 1's",
            hint="both must load the same files: check model.name and model.revision where each runs",
        )
    session.traffic = link.traffic = Traffic()  # getting to know each other does not count


def _release(model: Any, seam: Seam) -> None:
    """Let go of the base's weights, but for those that the head has too (an output layer's, where they are tied)."""
    kept = {id(p) for p in model.parameters() if p.requires_grad}
    kept |= {id(p) for layer in seam.adapted.values() for p in layer.adapter_parameters().values()}
    inside = set(model.base_model.modules())
    kept |= {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    for module in inside:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)


class _Body:
    """What stands for the base model."""

    def __init__(self, model: Any, link: Link, seam: Seam) -> None:
        self.link, self.seam, self.base = link, seam, model.base_model
        self.signature = inspect.signature(self.base.forward)
        self.modules: list[Any] = [*seam.adapted.values(), *seam.own.values()]  # by the numbers that the cloud calls
        self.states: list[int] = []  # of the adapted ones, as the cloud knows them
        self.calls: list[tuple[Tensor, Tensor]] = []  # of this pass: what came, and what it became

    # ---- passes ----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the base model's own."""
        given = self.signature.bind(*args, **kwargs).arguments
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        tensors, plain = {}, {}
        for name, value in given.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, (bool, int, float, str)):
                plain[name] = value
            elif value is not None:
                raise UserError(
                    f"train.base=apart: {type(self.base).__name__} is given '{name}', a {type(value).__name__}, which "
                    "can't be sent to another process",
                    hint="leave out metrics for which the model writes text",
                )
        anchor = torch.zeros((), requires_grad=True)
        found = _Pass.apply(anchor, self, tensors, plain, torch.is_grad_enabled())
        out = dict(zip(self.seam.needed, found, strict=True))
        # Heads may count the fields of what they get; nobody reads these.
        return self.seam.output(**{name: out.get(name, torch.empty(0)) for name in self.seam.fields})

    def run(self, tensors: Mapping[str, Tensor], plain: dict[str, Any], training: bool) -> tuple[Tensor, ...]:
        link, place = self.link, self.link.place
        link.training = training
        states = [ON * _is_on(layer) + TRAINS * _trains(layer) for layer in self.seam.adapted.values()]
        if states != self.states:
            link.send("states", {"states": torch.tensor(states, dtype=torch.uint8)}, training=training)
            self.states = states
        self.calls = []
        state = {RANDOM: random_state(place)} if self.base.training else {}
        link.send("forward", {**tensors, **state}, kind=INPUTS, training=training, plain=plain)
        while (message := link.receive()).word == "update":
            self._update(message)
        if state:
            set_random_state(message.tensors.pop(RANDOM), place)
        return tuple(message.tensors.values())

    def _update(self, message: Message) -> None:
        x, rest, number = message.tensors["x"], message.rest, message.rest["module"]
        x.requires_grad_(rest["wants"])
        dtype = getattr(torch, rest["dtype"])
        with torch.set_grad_enabled(rest["graph"]):
            module, is_adapter = self.modules[number], number < len(self.seam.adapted)
            # Added to nothing, the update is all there is.
            out = module.updated(x, torch.zeros((), dtype=dtype, device=x.device)) if is_adapter else module(x)
        self.link.answer(out.to(dtype), message.kind)
        if rest["graph"]:
            self.calls.append((x, out))
        if is_adapter and self.link.training:
            self._expect(x, module, wants=rest["wants"], graph=rest["graph"])

    def _expect(self, x: Tensor, layer: AdapterLayer, *, wants: bool, graph: bool) -> None:
        tokens, size, traffic = x.numel() // layer.d_in, x.element_size(), self.link.traffic
        traffic.formula += tokens * 2 * (layer.d_in + layer.d_out) * size
        traffic.unneeded += tokens * ((not wants) * layer.d_in + (not graph) * layer.d_out) * size

    def back(self, calls: list[tuple[Tensor, Tensor]], grads: tuple[Tensor | None, ...]) -> None:
        if calls is not self.calls:
            raise RuntimeError("only the newest pass can be gone back through: the cloud keeps no other")
        link = self.link
        link.training = True
        link.send("backward", {str(i): g for i, g in enumerate(grads) if g is not None}, kind=HIDDEN, training=True)
        while (message := link.receive()).word == "gradient":
            x, out = calls[message.rest["call"]]
            torch.autograd.backward(out, message.tensors["y"].to(out.dtype))
            if x.requires_grad:
                grad = torch.zeros_like(x) if x.grad is None else x.grad
                link.answer(grad, message.kind)
        self.calls = []


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, body: _Body, tensors: dict[str, Tensor], plain: dict[str, Any], training: bool
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outs = body.run(tensors, plain, training)
        ctx.body, ctx.calls = body, body.calls
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.body.back(ctx.calls, grads)
        return (None,) * 5


def _is_on(layer: AdapterLayer) -> bool:
    return layer.active and layer.rank > 0


def _trains(layer: AdapterLayer) -> bool:
    return any(p.requires_grad for p in layer.adapter_parameters().values())
