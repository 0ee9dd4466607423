"""Where a model is taken apart: what of its base stays on the device, and what its head reads of the base."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dora_cli.adapters.base import AdapterLayer
from dora_cli.errors import UserError
from dora_cli.modes import autocast, evaluating
from dora_cli.training.setup import Session


@dataclass(frozen=True)
class Seam:
    """Names are those in the base model.

    Attributes:
        adapted: the base's modules that have adapters; ``own``: others of it that train (a pooler that is new).
        output: the class of what the base returns; ``fields``: the names of all tensors in it; ``needed``: of those
            that the loss depends on.
        first_loss: of the first training row, in eval mode.
    """

    adapted: dict[str, AdapterLayer]
    own: dict[str, nn.Module]
    output: type
    fields: list[str]
    needed: list[str]
    first_loss: float


def find_seam(session: Session) -> Seam | None:
    """Look at the method, and at a pass over the first row with the base here; of a base without numbers, for a plan,
    at the method alone.

    Raises:
        UserError: more than what adapters add is trained in the base; or the model does not call its base once a pass.
    """
    model: Any = session.model
    base = model.base_model
    names = {module: name for name, module in base.named_modules()}
    adapted = {names[layer]: layer for layer in session.layers.values() if layer in names}
    heads = [model.get_submodule(name) for name in session.head_modules]
    own = {names[module]: module for module in heads if module in names}
    _check_method(session, base, adapted, own)
    if session.hollow:
        return None
    output, tensors, loss = _look(session, base)
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    needed = [name for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None]
    return Seam(adapted, own, output, list(tensors), needed, float(loss.detach()))


def first_loss(session: Session) -> Tensor:
    """Of the first training row, in eval mode."""
    batch = {name: tensor.to(session.device) for name, tensor in session.encoded["train"].batch([0]).items()}
    with evaluating(session.model), autocast(session.device, session.autocast_dtype):
        return session.task.loss(session.model, batch).total


def _check_method(
    session: Session, base: nn.Module, adapted: dict[str, AdapterLayer], own: dict[str, nn.Module]
) -> None:
    accounted = {id(p) for module in (*adapted.values(), *own.values()) for p in module.parameters()}
    reasons = [
        f"'{n}' needs the base's own output, or draws random numbers" for n, la in adapted.items() if not la.adds
    ]
    reasons += [
        f"'{n}' is trained itself" for n, p in base.named_parameters() if p.requires_grad and id(p) not in accounted
    ]
    if reasons:
        raise UserError(
            f"train.base=apart: method={session.composed.method} does more than add to what the frozen base says",
            where=reasons[0],
            hint="choose a method whose adapters only add, such as method=dlora or method=lora",
        )


def _look(session: Session, base: Any) -> tuple[type, dict[str, Tensor], Tensor]:
    """What the base returned, its tensors as leaves of the loss's graph, and the loss."""
    calls: list[tuple[type, dict[str, Tensor]]] = []
    forward = base.forward

    def listen(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        found = {k: t for k, t in out.items() if isinstance(t, Tensor) and t.is_floating_point()}
        calls.append((type(out), {name: t.detach().requires_grad_() for name, t in found.items()}))
        return type(out)(**calls[-1][1])

    if base is not session.model:  # of T5's model for summaries, say, no part is the base
        base.forward = listen
        try:
            loss = first_loss(session)
        finally:
            del base.forward
    if len(calls) != 1:
        raise UserError(
            f"train.base=apart: {type(session.model).__name__} has no base model that it calls as a whole, once a pass",
            hint="train it in one process with train.base=here, or choose another architecture",
        )
    return *calls[0], loss
