"""``dora-eval harness=…``: a language model on tasks of EleutherAI's lm-evaluation-harness."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from os.path import expanduser
from pathlib import Path
from typing import Any

from dora_cli.checkpoints.atomic import atomic_write_text
from dora_cli.config.schema import Config
from dora_cli.errors import UserError
from dora_cli.evaluation.harness import HarnessChoice, flat, load_tasks, run_harness
from dora_cli.reporting.events import jsonable
from dora_cli.reporting.terminal import print_scores
from dora_cli.training.setup import autocast_dtype, pick_device, seed_everything


def read_choice(own: Mapping[str, str]) -> HarnessChoice:
    """What the ``harness`` keys ask for.

    Raises:
        UserError: a value of the wrong kind.
    """
    tasks = [name.strip().strip("'\"") for name in own["harness"].strip("[] ").split(",")]
    if not all(tasks):
        raise UserError(
            f"harness={own['harness']} is no list of tasks", hint="for example harness=[hellaswag,arc_easy]"
        )
    chat = own.get("harness.chat_template", "false").lower()
    if chat not in ("true", "false"):
        raise UserError(f"harness.chat_template={chat} is neither true nor false")
    path = own.get("harness.include_path")
    return HarnessChoice(
        tasks=tasks,
        limit=_whole(own, "harness.limit", least=1),
        fewshot=_whole(own, "harness.fewshot", least=0),
        include_path=Path(expanduser(path)) if path else None,
        chat_template=chat == "true",
    )


def evaluate_through_harness(choice: HarnessChoice, load: Any, config: Config, checkpoint: str, out: Path) -> int:
    """Measure, print a table, and write ``eval-harness.json`` into ``out``.

    Args:
        choice: what is asked for.
        load: gives the model and its tokenizer; called when the tasks are there.
        config: says where and how the model runs.
        checkpoint: as the user named it.
        out: made where it is not there.
    """
    tasks = load_tasks(choice, offline=config.offline)
    model, tokenizer = load()
    seed_everything(config.seed)
    found = run_harness(
        model.to(pick_device(config.train.device)),
        tokenizer,
        tasks,
        choice,
        batch_size=config.train.eval_batch_size,
        autocast_dtype=autocast_dtype(config.train.precision),
    )
    out.mkdir(parents=True, exist_ok=True)
    settings = {"limit": choice.limit, "fewshot": choice.fewshot, "chat_template": choice.chat_template}
    record = {"checkpoint": checkpoint, "lm_eval": version("lm_eval"), "asked": choice.tasks, **settings, **found}
    path = out / "eval-harness.json"
    atomic_write_text(path, json.dumps(jsonable(record), indent=2) + "\n")
    print_scores(flat(found))
    print(f"written to {path}")
    return 0


def _whole(own: Mapping[str, str], key: str, *, least: int) -> int | None:
    text = own.get(key, "null")
    if text == "null":
        return None
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{key}={text} is no whole number of {least} or more")
    return int(text)
