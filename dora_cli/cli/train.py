"""``dora-train``: recipe and overrides in, a trained adapter out."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dora_cli.cli.help import train_help
from dora_cli.cli.key_help import explain
from dora_cli.cli.run import Arguments, answered, guard, split_flags
from dora_cli.config.recipes import check_names, search_folders
from dora_cli.errors import UserError

if TYPE_CHECKING:
    from dora_cli.config.compose import Composed


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ:  # torchrun's
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no C++ traces beside our own messages
        from dora_cli.cli.together_run import train_together
        from dora_cli.processes import environment

        return train_together(_compose_one, list(sys.argv[1:] if argv is None else argv), environment())
    return guard(train, argv)


def train(argv: list[str]) -> int:
    """Answer help and mistyped names at once, then load what is slow and run."""
    arguments = split_flags(argv)
    folders = search_folders(arguments.config_dirs)
    if answered(arguments, lambda: train_help(folders), lambda topic: explain(topic, folders)):
        return 0
    if arguments.multirun:
        from dora_cli.cli.sweep import sweep

        check_names(arguments.overrides, folders)
        return sweep(arguments.overrides, arguments.config_dirs)
    composed = _compose(arguments)
    if composed.config.train.base == "apart":
        from dora_cli.cli.apart_run import run_apart

        return run_apart(composed)
    from dora_cli.cli.train_run import run

    return run(composed) or 0


def _compose_one(argv: list[str]) -> "Composed":
    """The configuration of one of several processes.

    Raises:
        UserError: a flag that asks for something else than a run, or anything wrong in the words.
    """
    arguments = split_flags(argv)
    if arguments.multirun or arguments.help or arguments.version:
        raise UserError(
            "torchrun starts the processes of one run: -m, --help and --version are for dora-train by itself",
            hint="start each run of a sweep with a torchrun of its own",
        )
    return _compose(arguments)


def _compose(arguments: Arguments) -> "Composed":
    check_names(arguments.overrides, search_folders(arguments.config_dirs))
    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose

    return compose(arguments.overrides, load_parts(), arguments.config_dirs)


if __name__ == "__main__":
    sys.exit(main())
