"""``dora-eval``: measure a run, an adapter or a merged model on a split."""

import sys
from collections.abc import Sequence

from dora_cli.cli.help import eval_help
from dora_cli.cli.key_help import explain_plain
from dora_cli.cli.plain_keys import EVAL_KEYS
from dora_cli.cli.run import answered, guard, split_flags
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

HARNESS = ("harness", "harness.limit", "harness.fewshot", "harness.include_path", "harness.chat_template")
OWN = ("checkpoint", "recipe", "base", "split", "out", *HARNESS)
FROM_CONFIG = (
    "data.",
    "train.eval_batch_size",
    "train.device",
    "train.precision",
    "model.trust_remote_code",
    "model.quantization",
    "offline",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return guard(run, argv)


def run(argv: list[str]) -> int:
    """Answer help and mistyped keys at once, then load what is slow and measure."""
    arguments = split_flags(argv, ("-h", "--help", "--version", "--config-dir"))
    if answered(arguments, eval_help, lambda topic: explain_plain(topic, EVAL_KEYS, "dora-eval")):
        return 0
    own, rest = _split(arguments.overrides)
    from dora_cli.cli.eval_run import evaluate_checkpoint

    return evaluate_checkpoint(own, rest, arguments.config_dirs)


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own keys, and overrides of the configuration that concern an evaluation.

    Raises:
        UserError: a key of neither kind, or no ``checkpoint``.
    """
    own: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if key in OWN and equals and value:
            own[key] = value
        elif key == "data" or key.startswith(FROM_CONFIG):
            rest.append(word)
        else:
            raise UserError(
                f"unknown key '{key}'" if equals else f"'{word}' is no key=value",
                hint=did_you_mean(key, (*OWN, "data", *(k for k in FROM_CONFIG if not k.endswith(".")), "data.path")),
            )
    if "harness" not in own and (lost := next((key for key in own if key in HARNESS), None)):
        raise UserError(f"{lost} has no meaning without harness", hint="for example harness=[hellaswag,arc_easy]")
    if "checkpoint" not in own:
        raise UserError("checkpoint is not set", hint="dora-eval checkpoint=RUN_OR_ADAPTER_OR_MODEL")
    return own, rest


if __name__ == "__main__":
    sys.exit(main())
