"""``dora-report``: finished runs in, a comparison out."""

import sys
from collections.abc import Sequence

from dora_cli.cli.help import report_help
from dora_cli.cli.key_help import explain_plain
from dora_cli.cli.plain_keys import REPORT_KEYS
from dora_cli.cli.run import answered, guard, split_flags
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return guard(report, argv)


def report(argv: list[str]) -> int:
    """Answer help and mistyped keys at once, then load what is slow and compare."""
    arguments = split_flags(argv, ("-h", "--help", "--version"))
    if answered(arguments, report_help, lambda topic: explain_plain(topic, REPORT_KEYS, "dora-report")):
        return 0
    runs, options = parse(arguments.overrides)
    from dora_cli.cli.report_run import report_runs

    return report_runs(runs, **options)


def parse(words: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """The values of ``runs=``, which may stand several times, and the other keys. An empty value or ``null`` is none.

    Raises:
        UserError: a word that is no ``key=value``, an unknown key, one that is given twice, or no ``runs``.
    """
    runs: list[str] = []
    options: dict[str, str | None] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            hint = "quote the pattern, so that the shell leaves it alone: runs='runs/sweep/*'"
            raise UserError(f"'{word}' is no key=value", hint=hint)
        if key not in REPORT_KEYS:
            raise UserError(f"unknown key '{key}'", hint=did_you_mean(key, REPORT_KEYS))
        if key == "runs":
            runs.append(value)
        elif key in options:
            raise UserError(f"{key} is given twice", where=f"{key}={options[key]} and {word}")
        else:
            options[key] = value if value not in ("", "null") else None
    if not any(runs):
        raise UserError("runs= is missing", hint="dora-report runs='runs/sweep/*' [out=DIR]")
    return [value for value in runs if value], options


if __name__ == "__main__":
    sys.exit(main())
