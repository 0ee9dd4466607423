"""EleutherAI's lm-evaluation-harness on a model that is loaded already; an optional extra, imported when asked for."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from dora_cli.data.sources import network
from dora_cli.errors import UserError
from dora_cli.registry import near

NEEDS = ("lm_eval", "accelerate")  # the second one by the first one's wrapper of transformers' models
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
BOOTSTRAPS = 1000  # for the standard errors that have no formula
ALONE = "DISABLE_MULTIPROC"  # the harness's own switch
FEWSHOT_SEED = 1234  # the harness's own: which solved examples are shown


@dataclass(frozen=True)
class HarnessChoice:
    """What is asked of the harness.

    Attributes:
        tasks: names of tasks, groups or tags, ``*`` stands for anything.
        limit: rows of each task, the first ones; ``None`` for all.
        fewshot: solved examples before each question; ``None`` for each task's own number.
        include_path: a folder with the user's own task files.
        chat_template: write questions as a user's turn, by the tokenizer's chat template.
    """

    tasks: list[str]
    limit: int | None = None
    fewshot: int | None = None
    include_path: Path | None = None
    chat_template: bool = False


def load_tasks(choice: HarnessChoice, *, offline: bool) -> Any:
    """The tasks that were asked for, with their data: what ``lm_eval.evaluate`` takes as ``task_dict``.

    Raises:
        UserError: no harness, no such folder, no such task, a wrong task file, data that can't be had.
    """
    absent = [name for name in NEEDS if find_spec(name) is None]
    if absent:
        raise UserError(
            f"harness= needs EleutherAI's lm-evaluation-harness, and {' and '.join(absent)} is not installed",
            hint="pip install 'dora-cli[harness]'",
        )
    if choice.include_path is not None and not choice.include_path.is_dir():
        raise UserError(f"harness.include_path={choice.include_path}: no such folder")
    with _undisturbed(), network(allowed=not offline):
        manager, names = _found(choice)
        try:
            tasks = manager.load(names)
        except Exception as error:  # a task file may hold anything, code included
            raise UserError(
                f"harness={','.join(names)}: a task can't be loaded",
                where=f"{type(error).__name__}: {error}",
                hint="most data come from the hub: fetch them once with a connection and without offline=true; of a "
                "task of your own, look at its file",
            ) from error
    for task in tasks["tasks"].values():
        shots = task.get_config("num_fewshot")
        if choice.fewshot is not None and shots != 0:  # a task that says 0 means it, as in the harness's own command
            shots = choice.fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Any,
    choice: HarnessChoice,
    *,
    batch_size: int,
    autocast_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Measure a causal model on tasks of the harness.

    Args:
        model: on its device, in evaluation mode, adapters included.
        tokenizer: the model's.
        tasks: from :func:`load_tasks`.
        choice: what is asked for.
        batch_size: requests at a time.
        autocast_dtype: as in training; ``None`` for the weights' own.

    Returns:
        ``KEPT`` of the harness's results.

    Raises:
        UserError: a chat template is asked for, and the tokenizer has none.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if choice.chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError("harness.chat_template=true: the tokenizer has no chat template")
    with _undisturbed():
        wrapped = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype=autocast_dtype,
        )
        # Not `simple_evaluate`: it would also call git and pip, to describe the machine.
        found = lm_eval.evaluate(
            lm=wrapped,
            task_dict=tasks,
            limit=choice.limit,
            apply_chat_template=choice.chat_template,
            fewshot_as_multiturn=choice.chat_template,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
        )
    return {key: found[key] for key in KEPT if key in found}


def flat(record: dict[str, Any]) -> list[tuple[str, str, float, float | None, int]]:
    """(task, metric, value, standard error, rows) of every number in what :func:`run_harness` gives."""
    rows = []
    for task, numbers in record["results"].items():
        count = record.get("n-samples", {}).get(task, {}).get("effective", 0)
        for name, value in numbers.items():
            metric, comma, how = name.partition(",")  # metric, and the filter of answers that it was measured with
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = numbers.get(f"{metric}_stderr,{how}")
            label = metric if how == "none" else f"{metric} ({how})"
            rows.append((task, label, float(value), error if isinstance(error, float) else None, count))
    return rows


def _found(choice: HarnessChoice) -> tuple[Any, list[str]]:
    """The index in which the tasks are, and their names without any pattern left."""
    from lm_eval.tasks import TaskManager

    own = str(choice.include_path) if choice.include_path else None
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
        if set(choice.tasks) <= set(manager.all_subtasks):  # spares the harness's 14,000 names, which take many seconds
            return manager, choice.tasks
    manager = TaskManager(include_path=own)
    names: dict[str, None] = {}
    for asked in choice.tasks:
        found = [name for name in manager.all_tasks if fnmatchcase(name, asked)]
        if not found:
            close = near(asked, manager.all_tasks)
            raise UserError(
                f"harness={asked}: there is no such task",
                where=f"the harness knows {len(manager.all_tasks):,} tasks, groups and tags",
                hint=(f"did you mean {' or '.join(repr(name) for name in close)}?   " if close else "")
                + "`lm-eval ls tasks` lists them; your own are looked for in harness.include_path=DIR",
            )
        names.update(dict.fromkeys(found))
    return manager, list(names)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No remarks of the harness, no progress bars where nobody watches, and no processes: it would fork them for its
    standard errors, and a fork of a process with threads may wait for ever."""
    logger = logging.getLogger("lm_eval")
    before, switch = logger.level, os.environ.get(ALONE)
    logger.setLevel(logging.ERROR)
    os.environ[ALONE] = "1"
    try:
        with redirect_stdout(StringIO()), nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(before)
        os.environ.pop(ALONE) if switch is None else os.environ.update({ALONE: switch})
