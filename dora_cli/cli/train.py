"""``dora-train``: recipe and overrides in, a trained adapter out."""

import sys
from collections.abc import Sequence

from dora_cli.cli.help import train_help
from dora_cli.cli.run import answered, guard, split_flags
from dora_cli.config.recipes import check_names, search_folders


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return guard(train, argv)


def train(argv: list[str]) -> int:
    """Answer help and mistyped names at once, then load what is slow and run."""
    arguments = split_flags(argv)
    folders = search_folders(arguments.config_dirs)
    if answered(arguments, lambda: train_help(folders)):
        return 0
    check_names(arguments.overrides, folders)
    if arguments.multirun:
        from dora_cli.cli.sweep import sweep

        return sweep(arguments.overrides, arguments.config_dirs)
    from dora_cli.cli.parts import load_parts
    from dora_cli.config.compose import compose

    composed = compose(arguments.overrides, load_parts(), arguments.config_dirs)
    from dora_cli.cli.train_run import run

    return run(composed) or 0


if __name__ == "__main__":
    sys.exit(main())
