"""A run of two processes: one has the frozen base, the other all else (``train.base=apart``)."""

from contextlib import suppress

from torch import nn

from dora_cli.cli.signals import Signals
from dora_cli.cli.train_run import run
from dora_cli.config.compose import Composed
from dora_cli.data.tasks import build_task
from dora_cli.errors import UserError
from dora_cli.evaluation.scorers import build_scorer
from dora_cli.models.load import load_model
from dora_cli.processes import ALONE, World
from dora_cli.training.apart.cloud import Cloud
from dora_cli.training.apart.device import send_away
from dora_cli.training.apart.seam import Seam, find_seam
from dora_cli.training.apart.wire import Link
from dora_cli.training.setup import Session, autocast_dtype, lower, pick_device

DEVICE, CLOUD = 0, 1  # ranks


def run_apart(composed: Composed, world: World = ALONE) -> int:
    """Train as composed, with the base in process 1. Returns the exit code.

    Raises:
        UserError: in the process that finds it; the other one ends too.
    """
    _check(composed, world)
    if composed.config.dry_run:
        return run(composed, built=_check_session) if world.is_main else 0
    return _device(composed) if world.rank == DEVICE else _cloud(composed)


def _check(composed: Composed, world: World) -> None:
    """Refuse what can't be done apart, before anything is loaded.

    Raises:
        UserError: naming it.
    """
    config = composed.config
    if world.size != 2 and not (world.alone and config.dry_run):
        raise UserError(
            f"train.base=apart takes two processes, not {world.size}",
            hint="start it with torchrun --nproc-per-node 2 -m dora_cli.train …, or set train.base=here",
        )
    reasons = {
        "train.gradient_checkpointing=true": "what is computed twice would cross twice",
        "train.compile=true": "a compiler can't follow into the other process",
        "train.shard=full": "the base is whole in one process",
        "model.add_tokens": "their embeddings train inside the base",
    }
    train = config.train
    wanted = train.gradient_checkpointing, train.compile, train.shard == "full", bool(config.model.add_tokens)
    for (key, reason), is_set in zip(reasons.items(), wanted, strict=True):
        if is_set:
            raise UserError(f"{key} does not go with train.base=apart: {reason}", hint="leave one of the two out")


def _check_session(session: Session) -> Seam | None:
    """Refuse what is known when everything is built.

    Raises:
        UserError: naming it.
    """
    if build_scorer(session.task).writes:
        raise UserError(
            "train.base=apart: the model can't write text, which keeps a state in the base from word to word",
            where=f"data.metrics: {', '.join(session.task.metric_names)}",
            hint="choose metrics that need no writing, such as data.metrics=[token_accuracy]",
        )
    return find_seam(session)


def _device(composed: Composed) -> int:
    link = Link(CLOUD, pick_device(composed.config.train.device))

    def send(session: Session) -> None:
        seam = _check_session(session)
        assert seam is not None  # what has no numbers is planned, never trained
        send_away(session, link, seam)

    code = 1
    try:
        code = run(composed, built=send)
    except UserError:
        code = 2
        raise
    finally:
        with suppress(RuntimeError):  # the cloud may have gone before
            link.send("end", code=code)
    return code


def _cloud(composed: Composed) -> int:
    train = composed.config.train
    place, dtype = pick_device(train.device), autocast_dtype(train.precision)
    body = load_body(composed).to(place)
    with Signals(lambda text: None, alone=False):  # the device saves, and says when it is done
        return Cloud(body, Link(DEVICE, place), dtype).serve()


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
