"""All that exact resume needs, as tensors and JSON, and back. Writing files is the checkpoints room's business."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dora_cli.errors import UserError
from dora_cli.processes import Parcel
from dora_cli.training.setup import Session

FORMAT = 2  # of a checkpoint; another one is refused
SEPARATOR = "|"  # between a parameter's full name and the name of its moment


@dataclass
class Progress:
    """What the loop knows of the run so far. ``step`` counts optimizer steps done."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None  # {step, name, value, metrics}
    last: dict[str, Any] | None = None
    waited: int = 0  # evaluations since the best
    trained: int = 0  # trainable parameters, summed over steps
    pending_loss: float = 0.0  # of the steps since the last log
    pending_steps: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite


def capture(session: Session, progress: Progress) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The state after a step: one for all processes, in each of them.

    Returns:
        File stem → tensors, for safetensors; and the rest, for JSON.
    """
    allocation_tensors, allocation_rest = split(session.allocation.state_dict())
    own = session.own_random.state if session.own_random is not None else {}
    tensors = {
        "model": {name: p.detach() for name, p in session.trained_parameters().items()},
        "optimizer": moments(session.model, session.optimizer),
        "allocation": allocation_tensors,
        "random": _random_tensors(session.device) | _flat(session.world.gather(own)),
    }
    rest = {
        "format": FORMAT,
        "data": session.encoded["train"].fingerprint(),
        "stream": session.stream.state() if session.stream is not None else None,
        "progress": asdict(progress),
        "traffic": session.traffic.state() if session.traffic is not None else None,
        "scheduler": {"last_epoch": session.scheduler.last_epoch},
        "allocation": allocation_rest,
        "random": _random_numbers(),
    }
    return tensors, rest


def restore(session: Session, tensors: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Any]) -> Progress:
    """Put a captured state back into a freshly built session: shapes first, then values, moments and random states.

    Raises:
        UserError: it is of another version's format, or was trained on other data.
    """
    from dora_cli.training.optim import build_optimizer, build_scheduler

    if rest.get("format") != FORMAT:
        raise UserError(
            f"resume=true: the checkpoint has format {rest.get('format')}, this version reads {FORMAT}",
            hint="go on with the version that wrote it, or start anew in another out=DIR",
        )
    if rest["data"] != session.encoded["train"].fingerprint():
        raise UserError(
            "resume=true: the training data is not the interrupted run's",
            where=f"now {len(session.encoded['train']):,} rows; some lengths, labels or tokens differ",
            hint="put the data (and the tokenizer) back as they were, or start anew in another out=DIR",
        )
    if session.traffic is not None:
        session.traffic.load(rest["traffic"])
    if session.stream is not None:
        session.stream.restore(rest["stream"])
    session.allocation.load_state_dict(join(tensors["allocation"], rest["allocation"]))
    load_values(session.model, tensors["model"])
    config = session.config.train
    session.optimizer = build_optimizer(session.model, session.layers, session.head_modules, config)
    session.scheduler = build_scheduler(session.optimizer, config, session.total_steps)
    load_moments(session.model, session.optimizer, tensors["optimizer"])
    _advance(session, int(rest["scheduler"]["last_epoch"]))
    _load_random(session.device, tensors["random"], rest["random"])
    progress = Progress(**rest["progress"])
    if session.own_random is not None:
        session.own_random.restore(_own_states(tensors["random"]), session.world, progress.step)
    return progress


def load_values(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters, by full name, the values that they had; shapes must be those of then."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)


def moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Moments keyed by parameter name, so that they find their parameter whatever the groups look like."""
    return {
        f"{name}{SEPARATOR}{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for full_key, value in tensors.items():
        name, key = full_key.rsplit(SEPARATOR, 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device).clone()


def _advance(session: Session, last_epoch: int) -> None:
    """Set the learning rate to where it stood, by the same arithmetic as stepping there."""
    scheduler = session.scheduler
    scheduler.last_epoch = last_epoch
    factors: list[Any] = scheduler.lr_lambdas  # type: ignore[attr-defined]
    for group, base, factor in zip(session.optimizer.param_groups, scheduler.base_lrs, factors, strict=True):
        group["lr"] = base * factor(last_epoch)
    scheduler._last_lr = [group["lr"] for group in session.optimizer.param_groups]


def _random_tensors(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _flat(own: Sequence[Parcel]) -> dict[str, Tensor]:
    """Each process's own random states, by its rank and their names."""
    return {f"{rank}{SEPARATOR}{name}": state for rank, (states, _) in enumerate(own) for name, state in states.items()}


def _own_states(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """By rank, of as many processes as there were."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, state in tensors.items():
        rank, _, name = key.partition(SEPARATOR)
        if name:
            found.setdefault(int(rank), {})[name] = state
    return [found[rank] for rank in sorted(found)]


def _random_numbers() -> dict[str, Any]:
    name, keys, pos, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(pos), int(has_gauss), float(cached)],
    }


def _load_random(device: torch.device, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, pos, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"].cpu())
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"].cpu(), device)


def split(state: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An allocation's state as tensors, and the rest, for JSON."""
    flat = {f"{part}{SEPARATOR}{key}": value for part, values in state.items() for key, value in values.items()}
    return (
        {k: v for k, v in flat.items() if isinstance(v, Tensor)},
        {k: v for k, v in flat.items() if not isinstance(v, Tensor)},
    )


def join(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """And back."""
    state: dict[str, dict[str, Any]] = {part: {} for part in ("table", "importance", "allocator", "regularizer")}
    for full_key, value in {**tensors, **rest}.items():
        part, key = full_key.split(SEPARATOR, 1)
        state[part][key] = value
    return state
