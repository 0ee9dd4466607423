"""A run of two processes: one has the frozen base, the other all else (``train.base=apart``)."""

from contextlib import suppress

from torch import nn

from dora_cli.cli.train_run import run
from dora_cli.config.compose import Composed
from dora_cli.data.tasks import build_task
from dora_cli.errors import UserError
from dora_cli.evaluation.scorers import build_scorer
from dora_cli.models.load import load_model
from dora_cli.processes import World
from dora_cli.training.apart.cloud import Cloud
from dora_cli.training.apart.device import send_away
from dora_cli.training.apart.wire import Link
from dora_cli.training.setup import Session, autocast_dtype, lower, pick_device

DEVICE, CLOUD = 0, 1  # ranks
COMMAND = "torchrun --nproc-per-node 2 -m dora_cli.train"


def run_apart(composed: Composed, world: World) -> int:
    """Train as composed, with the base in process 1. Returns the exit code.

    Raises:
        UserError: in the process that finds it; the other ends too.
    """
    check_apart(composed, world)
    return _cloud(composed) if world.rank == CLOUD else _device(composed)


def check_apart(composed: Composed, world: World) -> None:
    """Refuse what can't be done apart, before anything is loaded.

    Raises:
        UserError: naming it.
    """
    config = composed.config
    if world.size != 2:
        number = "one process" if world.alone else f"{world.size} processes"
        raise UserError(
            f"train.base=apart takes two processes, and there is {number}"
            if world.alone
            else f"train.base=apart takes two processes, and there are {number}",
            hint=f"start it with {COMMAND} …, or set train.base=here",
        )
    refused = {
        "train.gradient_checkpointing=true": (
            config.train.gradient_checkpointing,
            "what is computed twice would cross twice",
        ),
        "train.compile=true": (config.train.compile, "a compiler can't see the other process"),
        "model.add_tokens": (bool(config.model.add_tokens), "their embeddings train inside the base"),
    }
    for key, (is_set, reason) in refused.items():
        if is_set:
            raise UserError(f"{key} does not go with train.base=apart: {reason}", hint="leave out one of the two")
    if not composed.parts["adapter"].wraps:
        raise UserError(
            f"train.base=apart: method={composed.method} trains the base itself, which is to be in another process",
            hint="choose a method with adapters, such as method=dlora or method=lora",
        )


def _device(composed: Composed) -> int:
    links: list[Link] = []

    def ready(session: Session) -> None:
        if getattr(build_scorer(session.task), "writes", False):
            raise UserError(
                "train.base=apart: the model can't write text, which takes a pass for every token",
                where=f"data.metrics={','.join(session.task.metric_names)}",
                hint="choose metrics of the tokens themselves, such as data.metrics=[token_accuracy]",
            )
        links.append(Link(CLOUD, session.device))
        send_away(session, links[0])

    code = 1
    try:
        code = run(composed, ready)
    except UserError:
        code = 2
        raise
    finally:
        with suppress(RuntimeError):  # it has gone by itself
            (links or [Link(CLOUD, pick_device("cpu"))])[0].send("end", code=code)
    return code


def _cloud(composed: Composed) -> int:
    train = composed.config.train
    place, dtype = pick_device(train.device), autocast_dtype(train.precision)
    return Cloud(load_body(composed).to(place), Link(DEVICE, place), dtype).serve()


def load_body(composed: Composed) -> nn.Module:
    """The base model without its head, frozen, in the type that it is multiplied in."""
    config, dtype = composed.config, autocast_dtype(composed.config.train.precision)
    loaded = load_model(
        config.model,
        auto_class=build_task(config.data).auto_class,
        offline=config.offline,
        max_length=config.data.max_length,
        max_target_length=config.data.max_target_length,
        as_stored=dtype is not None,
    )
    body: nn.Module = loaded.model.base_model.requires_grad_(False)
    if dtype is not None:
        lower(body, dtype)
    return body
