"""``--help``, without importing Hydra, OmegaConf or torch: it must answer in well under a second."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dora_cli.config.recipes import offered, sentences
from dora_cli.config.schema import MISSING, PART_GROUPS, Config
from dora_cli.config.sweeps import LAUNCHERS, SWEEPERS

WIDTH = 80
COLUMN = 30

# The options of parts stand with their classes, which import torch; these are the ones that scripts may rely on.
PART_KEYS = {
    "adapter.rank": "components per module at the start; null: from the budget",
    "adapter.alpha": "scale is alpha / start rank; null: scale 1",
    "adapter.dropout": "dropout on the adapter's input",
    "adapter.targets": "modules to adapt: a list, suffix or regex; null: all linear layers of the transformer",
    "adapter.init_from": "run or adapter folder to start from",
    "importance.beta": "smoothing of scores over steps",
    "schedule.start": "first allocation event: a share of the run, or a step",
    "schedule.end": "final choice of what lives: a share of the run, or a step",
    "allocator.interval": "steps between allocation events",
    "allocator.revive": "let pruned components return before the final choice",
    "allocator.min_rank": "components that every module keeps",
    "regularizer.weight": "weight of the regularizer in the loss",
}
EXIT_CODES = {
    "0": "success",
    "1": "a failure (full disk, no memory, a bug)",
    "2": "a mistake in the command or its files; nothing was written",
    "130, 143, 138, 129": "Ctrl-C, SIGTERM, SIGUSR1, SIGHUP: saved, resume=true goes on",
}


def train_help(folders: Sequence[Path]) -> str:
    """The text of ``dora-train --help``; ``folders`` are where recipes lie."""
    parts = {group: ", ".join(offered(group, folders)) for group in (*PART_GROUPS, "model", "data")}
    return "\n".join(
        [
            "usage: dora-train recipe=NAME_OR_FILE.yaml [budget=B] [method=M] [key=value …]",
            "",
            *_wrap("Fine-tune a transformer while its adapter shrinks to a budget. Keys come in any order."),
            *_section("recipes (recipe=NAME)", sentences("recipe", folders)),
            *_section("methods (method=NAME)", sentences("method", folders)),
            *_section("a method is one answer to each of five questions; change one by GROUP=NAME", parts),
            *_section("keys (defaults in brackets)", _keys(Config)),
            *_section("keys of parts (each part has its own default)", PART_KEYS),
            *_section(
                "flags",
                {
                    "-m, --multirun": "one run for each of budget=0.1,0.2 or seed=1,2,3; out is their parent",
                    "--config-dir DIR": "look for recipes, models and data here first; may be repeated",
                    "-h, --help": "this text",
                    "--version": "the version",
                },
            ),
            *_section("who runs and who proposes the jobs of -m, with keys (hydra.launcher.n_jobs=2)", _sweeps()),
            *_section("exit codes", EXIT_CODES),
            *_examples(
                "dora-train recipe=glue_sst2 budget=0.1",
                "dora-train recipe=glue_sst2 data.path=reviews.csv data.columns.text=review",
                "dora-train recipe=mine.yaml method=adalora train.epochs=3 out=runs/try",
                "dora-train -m recipe=glue_sst2 method=dora,lora seed=1,2,3",
                "dora-train -m recipe=glue_sst2 seed=1,2,3,4 hydra/launcher=joblib",
                "dora-train recipe=runs/try/config.yaml out=runs/again      (repeats a run)",
            ),
        ]
    )


def merge_help() -> str:
    """The text of ``dora-merge --help``."""
    return "\n".join(
        [
            "usage: dora-merge checkpoint=RUN_OR_ADAPTER out=DIR [key=value …]",
            "",
            *_wrap(
                "Add an adapter, or several, to the base model and write a plain transformers folder. Adapters may be "
                "dora-train's, PEFT's, MLX-LM's or AdapterHub's."
            ),
            *_section(
                "keys (defaults in brackets)",
                {
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
                },
            ),
            *_section("exit codes", EXIT_CODES),
            *_examples(
                "dora-merge checkpoint=runs/glue_sst2/dora-b0.1-s1 out=merged",
                "dora-merge checkpoint=[runs/a,runs/b] combine=ties weights=[1,0.5] out=both",
            ),
        ]
    )


def eval_help() -> str:
    """The text of ``dora-eval --help``."""
    return "\n".join(
        [
            "usage: dora-eval checkpoint=RUN_OR_ADAPTER_OR_MODEL [key=value …]",
            "",
            *_wrap(
                "Evaluate a run, an adapter or a merged model; write eval-SPLIT.json and predictions-SPLIT.jsonl. "
                "With harness=, a language model on tasks of EleutherAI's lm-evaluation-harness instead; write "
                "eval-harness.json (pip install 'dora-cli[harness]')."
            ),
            *_section(
                "keys (defaults in brackets)",
                {
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
                },
            ),
            *_section("exit codes", EXIT_CODES),
            *_examples(
                "dora-eval checkpoint=runs/glue_sst2/dora-b0.1-s1",
                "dora-eval checkpoint=runs/chat harness=[hellaswag,arc_easy] harness.limit=200",
                "dora-eval checkpoint=merged recipe=glue_sst2 data.path=test.csv split=test",
            ),
        ]
    )


def _keys(schema: type, prefix: str = "") -> dict[str, str]:
    """Key → sentence and default, nested dataclasses included."""
    hints, found = get_type_hints(schema), {}
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            found.update(_keys(hints[f.name], f"{prefix}{f.name}."))
            continue
        default: Any = f.default if f.default is not NO_DEFAULT else None
        options = f.metadata.get("choices")
        text = f.metadata["help"] + (f" ({', '.join(options)})" if options else "")
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        found[prefix + f.name] = text if default in (None, MISSING) else f"{text} [{shown}]"
    return found


def _sweeps() -> dict[str, str]:
    """The launchers and sweepers, each with the names of the options that those above it do not have."""
    found, said = {}, set()
    for group, table in (("launcher", LAUNCHERS), ("sweeper", SWEEPERS)):
        for name, schema in table.items():
            options = [option for option in _keys(schema, f"hydra.{group}.") if option not in said]
            said |= set(options)
            listed = f" ({', '.join(o.removeprefix(f'hydra.{group}') for o in options)})" if options else ""
            found[f"hydra/{group}={name}"] = f"{schema.__doc__}{listed}"
    return found


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _section(title: str, rows: Mapping[str, str]) -> list[str]:
    """A title and two columns; a name too long for its column gets a line of its own."""
    if not rows:
        return []
    lines = ["", *_wrap(title + ":")]
    column = min(COLUMN, max(len(name) for name in rows) + 4)
    for name, text in rows.items():
        texts = textwrap.wrap(text, WIDTH - column) or [""]
        if len(name) > column - 4:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name}".ljust(column) + texts.pop(0))
        lines += [" " * column + text for text in texts]
    return lines


def _examples(*lines: str) -> Iterable[str]:
    return ["", "examples:", *(f"  {line}" for line in lines)]
