"""``dora-compress``: a trained low-rank adapter in, a smaller one out."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_cli.allocation.budget import Budget, parse_budget
from dora_cli.cli.help import compress_help
from dora_cli.cli.key_help import explain_plain
from dora_cli.cli.plain_keys import COMPRESS_KEYS, read_plain, require
from dora_cli.cli.run import answered, guard, split_flags
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

CHOICES = {
    "rank_by": ("energy", "energy_per_parameter"),
    "export": ("exact", "uniform"),
    "dry_run": ("false", "true", "json"),
}
USAGE = "dora-compress checkpoint=RUN_OR_ADAPTER budget=0.5 out=DIR"


@dataclass(frozen=True)
class Options:
    """What is asked for, by ``budget`` or ``energy``. A dry run needs no ``out``, and keeps all by neither."""

    checkpoint: Path
    out: Path | None
    budget: Budget | None
    energy: float | None
    rank_by: str | None
    uniform: bool
    dry_run: str


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return guard(compress, argv)


def compress(argv: list[str]) -> int:
    """Answer help and mistyped keys at once, then load what is slow and compress."""
    arguments = split_flags(argv, ("-h", "--help", "--version"))
    if answered(arguments, compress_help, lambda topic: explain_plain(topic, COMPRESS_KEYS, "dora-compress")):
        return 0
    options = parse(arguments.overrides)
    from dora_cli.cli.compress_run import compress_adapter

    return compress_adapter(options)


def parse(words: Sequence[str]) -> Options:
    """``key=value`` words as options.

    Raises:
        UserError: an unknown, repeated or missing key, a value out of range, or keys that exclude each other.
    """
    given = read_plain(words, COMPRESS_KEYS)
    dry_run = _chosen(given, "dry_run") or "false"
    require(given, ("checkpoint",) if dry_run != "false" else ("checkpoint", "out"), USAGE)
    if "budget" in given and "energy" in given:
        where = f"budget={given['budget']} and energy={given['energy']}"
        raise UserError("budget and energy both say what is to be left", where=where, hint="give one of them")
    if not {"budget", "energy"} & given.keys() and dry_run == "false":
        hint = "budget=0.5 keeps half its parameters, energy=0.99 as many as that takes; dry_run=true shows a table"
        raise UserError("budget= or energy= is missing", hint=hint)
    uniform, rank_by = _chosen(given, "export") == "uniform", _chosen(given, "rank_by")
    if uniform and rank_by:
        raise UserError(
            f"rank_by={rank_by} has no meaning with export=uniform",
            where="one rank for all modules keeps the largest singular values of each; none are ranked together",
            hint="leave one of the two out",
        )
    return Options(
        checkpoint=Path(given["checkpoint"]).expanduser(),
        out=Path(given["out"]).expanduser() if "out" in given else None,
        budget=parse_budget(given.get("budget")),
        energy=None if "budget" in given else _share(given.get("energy", "1")),
        rank_by=rank_by,
        uniform=uniform,
        dry_run=dry_run,
    )


def _chosen(given: Mapping[str, str], key: str) -> str | None:
    value = given.get(key)
    if value is not None and value not in CHOICES[key]:
        raise UserError(f"unknown {key} '{value}'", hint=did_you_mean(value, CHOICES[key]))
    return value


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:  # NaN is in no range
        raise UserError(f"energy={text} is no share in (0, 1]", hint="energy=0.99 keeps 99 % of the sum of squares")
    return share


if __name__ == "__main__":
    sys.exit(main())
