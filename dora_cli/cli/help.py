"""``--help``, without importing Hydra, OmegaConf or torch: it must answer in well under a second."""

import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TextIO, get_type_hints

from dora_cli.cli.part_keys import part_keys, part_sentences
from dora_cli.cli.plain_keys import COMPRESS_KEYS, EVAL_KEYS, MERGE_KEYS, REPORT_KEYS
from dora_cli.config.recipes import offered, sentences
from dora_cli.config.schema import MISSING, PART_GROUPS, Config
from dora_cli.config.sweeps import LAUNCHERS, SWEEPERS
from dora_cli.registry import part_table

WIDTH = 80
COLUMN = 30
KEPT = "\N{NO-BREAK SPACE}"  # between words that stay on one line

EXIT_CODES: dict[str, str] = {
    "0": "success",
    "1": "a failure (full disk, no memory, a bug)",
    "2": "a mistake in the command or its files; nothing was written",
}
STOPPED = {"130, 143, 138, 129": "Ctrl-C, SIGTERM, SIGUSR1, SIGHUP: saved, resume=true goes on"}
INTERRUPTED = {"130, 143": "Ctrl-C, SIGTERM: nothing half written is left"}

ENVIRONMENT = {
    "NO_COLOR, FORCE_COLOR": "without colours, or with them in a pipe as well",
    "HF_HUB_OFFLINE": "1: never reach for the network (as offline=true)",
}
HELP_FLAGS = {
    "-h, --help [KEY]": "this text; with a key, what it is and how it is set",
    "--version": "the version",
}
CONFIG_DIR = {"--config-dir DIR": "look for recipes, models and data here first; may be repeated"}


def train_help(folders: Sequence[Path]) -> str:
    """The text of ``dora-train --help``; ``folders`` are where recipes lie."""
    parts = {group: ", ".join(offered(group, folders)) for group in (*PART_GROUPS, "model", "data")}
    return "\n".join(
        [
            "usage: dora-train recipe=NAME_OR_FILE.yaml [budget=B] [method=M] [key=value …]",
            "",
            *_wrap(
                "Fine-tune a transformer while its adapter shrinks to a budget. A recipe names model, data, method and "
                "their settings; keys change any of them, and come in any order. dry_run=true says what a run would do."
            ),
            *_section("recipes (recipe=NAME)", sentences("recipe", folders)),
            *_section("methods (method=NAME)", sentences("method", folders)),
            *_section("a method is one answer to each of five questions; change one by GROUP=NAME", parts),
            *_section("keys (defaults in brackets)", _keys(Config)),
            *_section("keys of parts (defaults in brackets, and those of single parts by name)", _part_keys()),
            *_section(
                "flags",
                {
                    "-m, --multirun": "one run for each of budget=0.1,0.2 or seed=1,2,3; out is their parent; "
                    "the same command again skips what is finished, and goes on with the rest",
                    **CONFIG_DIR,
                    **HELP_FLAGS,
                },
            ),
            *_section("who runs and who proposes the jobs of -m, with keys (hydra.launcher.n_jobs=2)", _sweeps()),
            *_section(
                "files, in out",
                {
                    "config.yaml": "every value as it was used; recipe=OUT/config.yaml repeats the run",
                    "adapter/": "the trained adapter and head, in PEFT's layout",
                    "summary.json": "what came out; written last: with it a run is finished",
                    "metrics.jsonl, ranks.json": "loss and metrics by step; what lives after each allocation event",
                    "train.log": "the plan, every line of the run, and its end, as plain text",
                    "checkpoints/": "from which resume=true goes on, exactly",
                },
            ),
            *_section("exit codes", {**EXIT_CODES, **STOPPED}),
            *_section("environment", ENVIRONMENT),
            *_examples(
                "dora-train recipe=glue_sst2 budget=0.1",
                "dora-train recipe=glue_sst2 budget=r4 dry_run=true",
                "dora-train recipe=glue_sst2 data.path=reviews.csv data.columns.text=review",
                "dora-train recipe=mine.yaml method=adalora train.epochs=3 out=runs/try",
                "dora-train -m recipe=glue_sst2 method=dora,lora seed=1,2,3",
                "dora-train -m recipe=glue_sst2 seed=1,2,3,4 hydra/launcher=joblib",
                "dora-train recipe=runs/try/config.yaml out=runs/again      (repeats a run)",
                "dora-train --help schedule.start",
            ),
            *_see_also("dora-recipes", "dora-report", "dora-merge", "dora-compress", "dora-eval"),
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
                "dora-train's, PEFT's, MLX-LM's or AdapterHub's. Weights are read and written in pieces, so memory "
                "does not grow with the model."
            ),
            *_section("keys (defaults in brackets)", MERGE_KEYS),
            *_section("flags", HELP_FLAGS),
            *_section(
                "files, in out",
                {
                    "model*.safetensors": "the merged weights, with an index where there are several files",
                    "config.json, tokenizer files": "as the base has them, with the run's labels",
                    "README.md": "a model card",
                    "manifest.json": "size and SHA-256 of each file; checked when they are read",
                },
            ),
            *_section("exit codes", {**EXIT_CODES, **INTERRUPTED}),
            *_section("environment", ENVIRONMENT),
            *_examples(
                "dora-merge checkpoint=runs/glue_sst2/dora-b0.1-s1 out=merged",
                "dora-merge checkpoint=adapter base=FOLDER dtype=bfloat16 out=merged",
                "dora-merge checkpoint=[runs/a,runs/b] combine=ties weights=[1,0.5] out=both",
            ),
            *_see_also("dora-train", "dora-eval", "dora-compress"),
        ]
    )


def compress_help() -> str:
    """The text of ``dora-compress --help``."""
    return "\n".join(
        [
            "usage: dora-compress checkpoint=RUN_OR_ADAPTER budget=B|energy=E out=DIR",
            "",
            *_wrap(
                "Make a trained low-rank adapter smaller, without data: the singular values of all modules are ranked "
                "together, and the best are kept. Adapters may be dora-train's, PEFT's, MLX-LM's or AdapterHub's. "
                "Heads, magnitudes and new tokens stay as they are. dry_run=true says what would be lost."
            ),
            *_section("keys (defaults in brackets)", COMPRESS_KEYS),
            *_section("flags", HELP_FLAGS),
            *_section(
                "files, in out",
                {
                    "adapter_*": "the adapter, in PEFT's layout, float32",
                    "compress.json": "ranks, errors, and the singular values kept and lost, by module",
                    "method.json": "what inference does not need",
                    "README.md": "a model card",
                    "manifest.json": "size and SHA-256 of each file; checked when they are read",
                },
            ),
            *_section("exit codes", {**EXIT_CODES, **INTERRUPTED}),
            *_examples(
                "dora-compress checkpoint=runs/first dry_run=true",
                "dora-compress checkpoint=runs/first budget=0.5 out=half",
                "dora-compress checkpoint=adapter energy=0.99 out=small",
                "dora-compress checkpoint=adapter budget=r8 export=uniform out=served",
            ),
            *_see_also("dora-train", "dora-eval", "dora-merge"),
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
            *_section("keys (defaults in brackets)", EVAL_KEYS),
            *_wrap("and the other data.* keys, train.eval_batch_size, train.device, train.precision, offline", "  "),
            *_section("flags", {**CONFIG_DIR, **HELP_FLAGS}),
            *_section(
                "files, in out or beside the checkpoint",
                {
                    "eval-SPLIT.json": "metrics, and what was evaluated on what",
                    "predictions-SPLIT.jsonl": "a row a line: its id or number, the prediction, the reference",
                },
            ),
            *_section("exit codes", {**EXIT_CODES, **INTERRUPTED}),
            *_section("environment", ENVIRONMENT),
            *_examples(
                "dora-eval checkpoint=runs/glue_sst2/dora-b0.1-s1",
                "dora-eval checkpoint=runs/chat harness=[hellaswag,arc_easy] harness.limit=200",
                "dora-eval checkpoint=merged recipe=glue_sst2 data.path=test.csv split=test",
            ),
            *_see_also("dora-train", "dora-merge", "dora-compress"),
        ]
    )


def recipes_help() -> str:
    """The text of ``dora-recipes --help``."""
    return "\n".join(
        [
            "usage: dora-recipes [list [GROUP]]",
            "       dora-recipes show NAME [key=value …]",
            "       dora-recipes copy NAME to=FILE.yaml",
            "       dora-recipes diff MINE [NAME]",
            "       dora-recipes completion bash|zsh|fish",
            "",
            *_wrap(
                "See what can be run, look into it, and make one's own of it. NAME is a recipe; a model, data or "
                "method file is named with its group, such as method/dora. Recipes may also be files (mine.yaml)."
            ),
            *_section(
                "commands",
                {
                    "list [GROUP]": "recipes, or what GROUP offers: method, model, data, or one of the five parts",
                    "show NAME": "the whole configuration that a recipe comes to, each value with where it stands; of "
                    "method/dora and the like the file",
                    "copy NAME to=FILE": "write a copy to edit; never over a file that is there",
                    "diff MINE [NAME]": "what a recipe, or a run's config.yaml, changes of the one it was made from",
                    "completion SHELL": "print what makes TAB complete keys, names and files",
                },
            ),
            *_section("flags", {**CONFIG_DIR, **HELP_FLAGS}),
            *_section("exit codes", EXIT_CODES),
            *_section("environment", ENVIRONMENT),
            *_examples(
                "dora-recipes list method",
                "dora-recipes show glue_sst2 method=lora",
                "dora-recipes copy glue_sst2 to=mine.yaml",
                "dora-recipes diff mine.yaml",
                "dora-recipes diff runs/try/config.yaml glue_sst2",
                'eval "$(dora-recipes completion bash)"        (in ~/.bashrc)',
            ),
            *_see_also("dora-train"),
        ]
    )


def report_help() -> str:
    """The text of ``dora-report --help``."""
    return "\n".join(
        [
            "usage: dora-report runs=GLOB_OR_LIST [out=DIR] [baseline=METHOD]",
            "",
            *_wrap(
                "Compare finished runs: those that differ in nothing but the seed are one group. Prints a table of the "
                "groups, and writes a page. A sweep (dora-train -m) ends with the same."
            ),
            *_section("keys (defaults in brackets)", REPORT_KEYS),
            *_section("flags", HELP_FLAGS),
            *_section(
                "files, in out",
                {
                    "index.html": "quality against parameters, curves, rank maps, what differs: one file",
                    "table.csv": "a row a run",
                    "summary.csv, table.md": "a row a group: means and standard deviations over seeds",
                    "*.png": "the charts",
                },
            ),
            *_section("exit codes", EXIT_CODES),
            *_examples(
                "dora-report runs='runs/sweep/*'",
                "dora-report runs=runs/a,runs/b out=a-against-b",
                "dora-report runs='runs/**' baseline=lora out=report",
            ),
            *_see_also("dora-train"),
        ]
    )


def styled(text: str, *, color: bool) -> str:
    """Help with its headings in bold, where that is wanted."""
    if not color:
        return text
    return re.sub(r"^(usage:|(?! ).+:$)", "\033[1m\\1\033[0m", text, flags=re.MULTILINE)


def wants_color(stream: TextIO) -> bool:
    """By what is usual: NO_COLOR is no, FORCE_COLOR is yes, else a terminal that is not a dumb one."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def _part_keys() -> dict[str, str]:
    """Key → sentence, the parts that read it where they are few, and the default, with the parts that differ."""
    found = {}
    for group in PART_GROUPS:
        everyone = len(part_table(group))
        for name, key in part_keys(group).items():
            values = [shown(value) for value in key.defaults.values()]
            usual = max(values, key=values.count)
            others = [f"{part} {shown(value)}" for part, value in key.defaults.items() if shown(value) != usual]
            readers = f" ({', '.join(key.defaults)})" if len(values) <= 3 and len(values) < everyone else ""
            default = f" [{', '.join([usual, *others])}]" if usual != "null" or others else ""
            found[name] = f"{key.meta['help']}{readers}{default}"
    return found


def _keys(schema: type, prefix: str = "") -> dict[str, str]:
    """Key → sentence and default, nested dataclasses included."""
    hints, found = get_type_hints(schema), {}
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            found.update(_keys(hints[f.name], f"{prefix}{f.name}."))
            continue
        default: Any = f.default if f.default is not NO_DEFAULT else None
        options = f.metadata.get("choices")
        text = f.metadata["help"] + (f" ({', '.join(map(shown, options))})" if options else "")
        found[prefix + f.name] = text if default is None or default == MISSING else f"{text} [{shown(default)}]"
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
    lines = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace(KEPT, " ") for line in lines]


def _section(title: str, rows: Mapping[str, str]) -> list[str]:
    """A title and two columns."""
    return ["", *_wrap(title + ":"), *columns(rows)] if rows else []


def offers(group: str, folders: Sequence[Path]) -> dict[str, str]:
    """Name → sentence of everything that a group offers; of parts without a file, what their class says."""
    said = {**part_sentences(group), **sentences(group, folders)}
    return {name: said.get(name, "") for name in offered(group, folders)}


def columns(rows: Mapping[str, str], indent: str = "  ", column: int = COLUMN) -> list[str]:
    """Names and sentences in two columns; a name too long for its column gets a line of its own."""
    column = min(column, max(map(len, rows), default=0) + 2 + len(indent))
    lines = []
    for name, text in rows.items():
        texts = textwrap.wrap(text, WIDTH - column) or [""]
        if len(name) + len(indent) + 2 > column:
            lines.append(f"{indent}{name}")
        else:
            lines.append(f"{indent}{name}".ljust(column) + texts.pop(0))
        lines += [" " * column + text for text in texts]
    return [line.rstrip() for line in lines]


def shown(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _see_also(*commands: str) -> Iterable[str]:
    return ["", "see also:", *_wrap(", ".join(f"{command}{KEPT}--help" for command in commands), "  ")]


def _examples(*lines: str) -> Iterable[str]:
    return ["", "examples:", *(f"  {line}" for line in lines)]
