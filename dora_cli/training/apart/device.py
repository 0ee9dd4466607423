"""The device's side: the loop's model, whose base model runs in the cloud and asks back for what adapters add.

The device never decides an order. Within a pass it answers what the cloud asks, in whichever order that comes, so that
neither waits for the other's turn.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dora_cli.adapters.base import AdapterLayer
from dora_cli.errors import UserError
from dora_cli.modes import autocast, evaluating
from dora_cli.training.apart.cloud import ON, TRAINS, told
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
from dora_cli.training.setup import ROUNDING, Session


def send_away(session: Session, link: Link) -> None:
    """Let the cloud run the session's base model from here on, and let go of its weights.

    Raises:
        UserError: this model or method can't be taken apart, or the cloud holds another base.
    """
    model: Any = session.model
    reads, here = _reads(session)
    body = _Body(session, link, reads)
    body.introduce()
    _release(model, body)
    model.base_model.forward = body.forward
    with torch.no_grad():
        there = float(_loss(session))
    if not abs(there - here) <= ROUNDING[session.autocast_dtype] * max(1.0, abs(here)):
        raise UserError(
            "train.base=apart: the two processes do not hold the same base model",
            where=f"the first row has a loss of {here:.6g} with this process's, {there:.6g} with the other's",
            hint="both must load the same files: check model.name and model.revision on both sides",
        )
    session.traffic = link.traffic = Traffic()  # getting to know each other does not count


class Reads(NamedTuple):
    """What the head reads of the base model: the class of its output, all tensors in it, and those that matter."""

    kind: type
    names: list[str]
    needed: list[str]


def _reads(session: Session) -> tuple[Reads, float]:
    """Found by a pass over the first row with the base here; also that row's loss.

    Raises:
        UserError: the model does not call its base model as a whole, once.
    """
    model: Any = session.model
    name, base = type(model).__name__, model.base_model
    calls: list[tuple[type, dict[str, Tensor]]] = []
    forward = base.forward

    def listen(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        tensors = {k: t.detach().requires_grad_() for k, t in out.items() if isinstance(t, Tensor)}
        calls.append((type(out), tensors))
        return type(out)(**tensors)

    loss = None
    if base is not model:
        base.forward = listen
        try:
            loss = _loss(session)
        finally:
            del base.forward
    if loss is None or len(calls) != 1:
        raise UserError(
            f"train.base=apart: {name} has no base model that its head calls as a whole, once a pass",
            hint="train it in one process, or choose another architecture",
        )
    kind, tensors = calls[0]
    grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    needed = [k for k, grad in zip(tensors, grads, strict=True) if grad is not None]
    return Reads(kind, list(tensors), needed), float(loss)


def _loss(session: Session) -> Tensor:
    """Of the first training row, in eval mode."""
    batch = {k: v.to(session.device) for k, v in session.encoded["train"].batch([0]).items()}
    with evaluating(session.model), autocast(session.device, session.autocast_dtype):
        return session.task.loss(session.model, batch).total


def _release(model: Any, body: "_Body") -> None:
    """Let go of the base's weights, but for those that the head has too (an output layer's, where they are tied)."""
    kept = {id(p) for p in model.parameters() if p.requires_grad}
    kept |= {id(p) for layer in body.adapted.values() for p in layer.adapter_parameters().values()}
    inside = set(model.base_model.modules())
    kept |= {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    for module in inside:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)


class _Body:
    """What stands for the base model.

    Attributes:
        adapted: the adapted modules of the base, by their names in it; ``own``: others of it that train.
    """

    def __init__(self, session: Session, link: Link, reads: Reads) -> None:
        model: Any = session.model
        self.link, self.reads = link, reads
        base = model.base_model
        self.signature = inspect.signature(base.forward)
        names = {module: name for name, module in base.named_modules()}
        self.adapted: dict[str, AdapterLayer] = {names[m]: m for m in session.layers.values() if m in names}
        heads = [model.get_submodule(name) for name in session.head_modules]
        self.own: dict[str, nn.Module] = {names[m]: m for m in heads if m in names}
        self._check(session, base)
        self.base = base
        self.modules = [*self.adapted.values(), *self.own.values()]
        self.states: list[int] = []  # as the cloud knows them
        self.calls: list[tuple[Tensor, Tensor]] = []  # of this pass: what came, and what it became

    def _check(self, session: Session, base: nn.Module) -> None:
        mixed = [name for name, layer in self.adapted.items() if not layer.adds]
        if mixed:
            raise UserError(
                f"train.base=apart: the update of method={session.composed.method} is no function of its input alone",
                where=f"'{mixed[0]}' needs the base's weights or draws random numbers",
                hint="choose a method whose adapters add to the base's output, such as method=dlora or method=lora",
            )
        accounted = {id(p) for m in (*self.adapted.values(), *self.own.values()) for p in m.parameters()}
        stray = [name for name, p in base.named_parameters() if p.requires_grad and id(p) not in accounted]
        if stray:
            raise UserError(
                f"train.base=apart: '{stray[0]}' of the base itself trains, and the base is to be in another process",
                hint="choose a method that trains adapters alone, such as method=dlora or method=lora",
            )

    def introduce(self) -> None:
        names = {"adapted": list(self.adapted), "own": list(self.own), "reads": self.reads.needed}
        self.link.send("begin", {name: told(some) for name, some in names.items()})

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
        out = dict(zip(self.reads.needed, found, strict=True))
        # Heads may count the fields of what they get; nobody reads these.
        return self.reads.kind(**{name: out.get(name, torch.empty(0)) for name in self.reads.names})

    def run(self, tensors: Mapping[str, Tensor], plain: dict[str, Any], training: bool) -> tuple[Tensor, ...]:
        link, place = self.link, self.link.place
        link.training = training
        states = [ON * _is_on(layer) + TRAINS * _trains(layer) for layer in self.adapted.values()]
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
            module: Any = self.modules[number]
            is_adapter = number < len(self.adapted)
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
