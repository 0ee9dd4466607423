"""``dora-merge``: an adapter and its base in, a plain transformers folder out."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dora_cli.cli.folder_lists import split_list
from dora_cli.cli.help import merge_help
from dora_cli.cli.key_help import explain_plain
from dora_cli.cli.plain_keys import MERGE_KEYS, read_plain, require
from dora_cli.cli.run import answered, guard, split_flags
from dora_cli.errors import UserError

if TYPE_CHECKING:
    from dora_cli.checkpoints.merge import MergeReport

REQUIRED = ("checkpoint", "out")
HUB = ("push_to_hub", "hub.private")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return guard(merge, argv)


def merge(argv: list[str]) -> int:
    """Answer help and mistyped keys at once, then load what is slow and merge."""
    arguments = split_flags(argv, ("-h", "--help", "--version"))
    if answered(arguments, merge_help, lambda topic: explain_plain(topic, MERGE_KEYS, "dora-merge")):
        return 0
    options = typed(parse(arguments.overrides))
    repository, private = (options.pop(key, None) for key in HUB)
    from dora_cli.checkpoints.merge import merge as merge_files
    from dora_cli.cli.publish_run import merge_card, require_hub, upload

    if repository:
        repository = require_hub(repository, private)
    checkpoint, out = options.pop("checkpoint"), options.pop("out")
    report = merge_files(checkpoint, out, card=lambda done: merge_card(done, repository), **options)
    print(describe(report))
    return upload(report.out, repository, private) if repository else 0


def parse(words: Sequence[str]) -> dict[str, str]:
    """``key=value`` words as a dictionary; a value may hold anything, ``=`` too. An empty or ``null`` value is none.

    Raises:
        UserError: a word that is no ``key=value``, an unknown or repeated key, or a required one missing.
    """
    options = read_plain(words, MERGE_KEYS)
    require(options, REQUIRED, "dora-merge checkpoint=RUN_OR_ADAPTER out=DIR")
    return options


def typed(options: dict[str, str]) -> dict[str, Any]:
    """Lists and numbers of what was given as text.

    Raises:
        UserError: no number where one is expected.
    """
    values: dict[str, Any] = dict(options)
    if options["checkpoint"].startswith("["):
        values["checkpoint"] = split_list(options["checkpoint"])
        if not values["checkpoint"]:
            raise UserError("checkpoint=[] names no adapter", hint="write checkpoint=[runs/a,runs/b]")
    if "weights" in options:
        values["weights"] = [
            _number(item, float, f"weights={options['weights']}") for item in _items(options["weights"])
        ]
    for key, kind in (("density", float), ("seed", int)):
        if key in options:
            values[key] = _number(options[key], kind, f"{key}={options[key]}")
    if private := options.get("hub.private"):
        if private not in ("true", "false") or "push_to_hub" not in options:
            raise UserError(f"hub.private={private} is true or false, and goes with push_to_hub=NAME")
        values["hub.private"] = private == "true"
    return values


def _items(text: str) -> list[str]:
    """``[a, b]``, or ``a`` alone."""
    items = [item.strip().strip("\"'") for item in text.strip().removeprefix("[").removesuffix("]").split(",")]
    return [item for item in items if item]


def _number(text: str, kind: type[int] | type[float], given: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        wanted = "whole number" if kind is int else "number"
        raise UserError(f"{given}: '{text}' is no {wanted}") from None


def describe(report: "MergeReport") -> str:
    """What was merged, in a few lines of at most 80 columns, paths apart."""
    adapted = [rank for rank in report.ranks.values() if rank]
    lines = [
        f"merged {report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s, {_count(report.shards, 'file')}",
        f"  base     {report.base}",
    ]
    if report.quantization and report.base_weights == "original":
        lines.append(f"  onto     the original weights; the run was trained on {report.quantization} ones, to which")
        lines.append("           base_weights=dequantised adds")
    elif report.quantization:
        lines.append(f"  onto     the {report.quantization} weights that the run was trained on, dequantised")
    if report.combination:
        c = report.combination
        kept = "" if c.how == "linear" else f", density {c.density:g}" + (f", seed {c.seed}" if "dare" in c.how else "")
        lines.append(f"  adapters {_count(len(c.weights), 'adapter')}, {c.how}{kept}")
        lines += [f"           {weight:g} × {f}" for weight, f in zip(c.weights, report.adapters, strict=True)]
    if adapted:
        if report.kind == "MORA":
            word, content = "side", _count(sum(side * side for side in adapted), "parameter")
        else:
            word, content = "rank", _count(sum(adapted), "component")
        span = f"{word} {min(adapted)}" if len(set(adapted)) == 1 else f"{word}s {min(adapted)} to {max(adapted)}"
        title = "together" if report.combination else "adapter "
        lines.append(f"  {title} {_count(len(adapted), 'module')}, {span}, {content}")
    if report.dtypes:
        lines.append(f"  dtype    {', '.join(report.dtypes)}")
    if report.head:
        lines.append(f"  head     {_count(len(report.head), 'tensor')} as trained ({_few(report.head)})")
    if report.tokens:
        lines.append(f"  tokens   embeddings of {_count(report.tokens, 'token')} as trained")
    if report.left_out:
        lines.append(f"  left out {_count(len(report.left_out), 'tensor')} of another head ({_few(report.left_out)})")
    return "\n".join([*lines, f"  out      {report.out}"])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _few(names: Sequence[str]) -> str:
    return names[0] + (", …" if len(names) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
