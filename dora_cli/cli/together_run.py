"""``torchrun -m dora_cli.train``: the processes of one run meet, and go the same way or none."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from dora_cli.cli.apart_run import run_apart
from dora_cli.cli.run import FAILURE, guard, print_error
from dora_cli.cli.train_run import run
from dora_cli.config.compose import Composed
from dora_cli.config.differences import differences
from dora_cli.errors import UserError
from dora_cli.processes import EndedElsewhereError, NotMetError, World, is_lost, join, leave, linger, said_first, why

LATE = "one of them has not answered for as long as train.timeout says"
PATIENCE = 600.0  # seconds, where the configuration can't be read


def train_together(prepare: Callable[[list[str]], Composed], argv: list[str], world: World) -> int:
    """Compose in every process and train in all of them. Returns the exit code, or ends this process with it."""
    _hush(world)
    code = guard(lambda words: _together(prepare, words, world), argv)
    if code:
        linger(world)
        # What other threads wait for, of processes that have gone, may never come.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    leave()
    return 0


def _together(prepare: Callable[[list[str]], Composed], argv: list[str], world: World) -> int:
    mistake, composed = None, None
    try:
        composed = prepare(argv)
    except UserError as error:
        mistake = error
    timeout = composed.config.train.timeout if composed is not None else PATIENCE
    try:
        join(world, timeout)
    except NotMetError as error:
        print_error(
            f"process {world.rank} of {world.size} has not met the others within train.timeout={timeout:g} s",
            str(error),
            "their own messages say why; on several machines all take the same torchrun command, address and port",
        )
        return FAILURE
    try:
        with world.together():
            if mistake is not None:
                raise mistake
        assert composed is not None
        _same(world, composed)
        return (run_apart if composed.config.train.base == "apart" else run)(composed, world)
    except EndedElsewhereError as error:
        return error.code
    except UserError as error:
        if said_first(world, str(error)):
            raise
        return 2
    except Exception as error:
        if not is_lost(error):
            said_first(world, f"{type(error).__name__}: {error}")
            raise
        print_error(
            f"process {world.rank} has lost the others of this run",
            why() or (LATE if "imed out" in str(error) else "one of them has been killed, or is out of reach"),
            "the newest checkpoint is whole: start all processes again with resume=true",
        )
        return FAILURE


def _same(world: World, composed: Composed) -> None:
    """Refuse processes that were started with other words.

    Raises:
        UserError: in the main process, naming what differs.
    """
    config = composed.config
    words = [f"{k}: {getattr(config, k)}" for k in ("out", "resume", "overwrite", "dry_run")]
    told: Sequence[list[str]] = [rest for _, rest in world.gather({}, [composed.yaml, *words])]
    with world.together():
        for rank, (yaml, *others) in enumerate(told):
            different = differences(told[0][0], yaml)
            different += [f"{a} → {b.partition(': ')[2]}" for a, b in zip(told[0][1:], others, strict=True) if a != b]
            if different and world.is_main:
                raise UserError(
                    "the processes of this run were not started with the same configuration",
                    where=f"process 0 → process {rank}: {'; '.join(different[:6])}",
                    hint="give every machine the same command",
                )


def _hush(world: World) -> None:
    """The main process alone speaks, but for errors."""
    if world.is_main:
        return
    from transformers.utils import logging

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
