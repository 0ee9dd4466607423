"""The keys of the commands whose keys are words alone, a sentence each, and how such words are read."""

from collections.abc import Mapping, Sequence

from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean

MERGE_KEYS = {
    "checkpoint": "run folder, or adapter folder; several: [runs/a,runs/b]",
    "out": "folder for the merged model; must not hold one",
    "base": "base model by hub name or folder; null: the one the adapter names",
    "base_weights": "of a run on a quantised base: original, or dequantised as in training [original]",
    "dtype": "auto, float32, bfloat16 or float16; auto keeps the base's [auto]",
    "shard_size": "largest file [5GB]",
    "combine": "how several become one: linear, ties, dare_linear or dare_ties",
    "weights": "of several adapters, e.g. [0.7,0.3] [1 each]",
    "density": "share of an update's elements that ties and dare keep [0.5]",
    "seed": "of the elements that dare keeps [1]",
    "heads_from": "the one whose head and tokens are kept, where several have some",
    "push_to_hub": "repository on the hub to upload the model to",
    "hub.private": "whether a new repository is private: true or false",
}
EVAL_KEYS = {
    "checkpoint": "run folder, adapter folder, or model folder",
    "recipe": "where task and data come from; null: the run's own",
    "base": "base model by hub name or folder; null: the one the adapter names",
    "model.quantization": "how the base is packed; left out: as in training, and a model not at all",
    "split": "split to evaluate [validation]",
    "data.path": "file or folder to evaluate on instead",
    "out": "folder for the files; null: beside the checkpoint",
    "harness": "tasks, groups or tags, e.g. [hellaswag,arc_easy]; * stands for anything",
    "harness.limit": "only the first N rows of each task; null: all",
    "harness.fewshot": "solved examples before each question; null: the task's own",
    "harness.include_path": "folder with task files of your own",
    "harness.chat_template": "ask in the words of the tokenizer's chat template [false]",
}
REPORT_KEYS = {
    "runs": "run folders: a pattern ('runs/sweep/*', 'runs/**'), a list (a,b), or a folder of runs; may stand several "
    "times",
    "out": "folder for the comparison: new, empty, or one to replace [comparison, beside the runs]",
    "baseline": "method or group that all are compared with, seed by seed [the best]",
}
COMPRESS_KEYS = {
    "checkpoint": "run folder, or adapter folder",
    "budget": "what is left: a share of its parameters (0.5), parameters (40k), or an average rank (r4)",
    "energy": "or the share of the sum of squared singular values to keep, in (0, 1]",
    "out": "folder for the smaller adapter; must not hold anything",
    "rank_by": "energy (squared singular value) or energy_per_parameter; null: energy with budget=rN, else the other",
    "export": "exact, or uniform: one rank for all modules [exact]",
    "dry_run": "say what would be kept, write nothing (true, json) [false]",
}


def read_plain(words: Sequence[str], keys: Mapping[str, str]) -> dict[str, str]:
    """``key=value`` words as a dictionary; a value may hold anything, ``=`` too. An empty or ``null`` value is none.

    Raises:
        UserError: a word that is no ``key=value``, or an unknown or repeated key.
    """
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in keys:
            raise UserError(f"unknown key '{key}'", hint=did_you_mean(key, keys))
        if not equals:
            raise UserError(f"'{word}' has no value", hint=f"write {word}=VALUE")
        if key in options:
            raise UserError(f"{key} is given twice", where=f"{key}={options[key]} and {word}")
        options[key] = value
    return {key: value for key, value in options.items() if value not in ("", "null")}


def require(options: Mapping[str, str], keys: Sequence[str], usage: str) -> None:
    """Raise a UserError that names the first of the keys which is not given."""
    if missing := [key for key in keys if key not in options]:
        raise UserError(f"{missing[0]}= is missing", hint=usage)
