"""Kinds of tasks: what a row must hold, which model it needs, what the loss is and what is predicted."""

from typing import Any

from dora_cli.errors import UserError
from dora_cli.registry import load

TASKS = {
    "classification": "dora_cli.data.tasks.classification:Classification",
    "regression": "dora_cli.data.tasks.regression:Regression",
    "ner": "dora_cli.data.tasks.ner:Ner",
    "multiple_choice": "dora_cli.data.tasks.multiple_choice:MultipleChoice",
    "sft": "dora_cli.data.tasks.sft:Sft",
    "clm": "dora_cli.data.tasks.clm:Clm",
    "qa": "dora_cli.data.tasks.qa:QuestionAnswering",
    "summarization": "dora_cli.data.tasks.summarization:Summarization",
}

# Options that not every task reads; null leaves them out.
READ_BY = {
    "template": ("sft", "summarization"),
    "answer": ("sft",),
    "packing": ("sft", "clm"),
    "max_target_length": ("summarization",),
    "num_beams": ("sft", "summarization"),
    "length_penalty": ("sft", "summarization"),
    "no_repeat_ngram_size": ("summarization",),  # elsewhere the prompt's tokens would count
    "doc_stride": ("qa",),
    "max_answer_length": ("qa",),
    "null_answers": ("qa",),
}

LOWER_IS_BETTER = frozenset({"loss", "mse", "mae", "perplexity"})


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric (a name of ``data.metrics``, or ``loss``) is better."""
    return metric not in LOWER_IS_BETTER


def build_task(config: Any) -> Any:
    """The task that ``config.task`` names (a ``config.schema.DataConfig``), not yet fitted to rows.

    Raises:
        UserError: there is no such task, or it does not read an option that is set.
    """
    for option, tasks in READ_BY.items():
        value = getattr(config, option, None)
        is_set = value is not None and (value is not False or option != "packing")
        if is_set and config.task in TASKS and config.task not in tasks:
            raise UserError(
                f"data.{option} is read by data.task={' and '.join(tasks)}, not by {config.task}",
                hint=f"leave data.{option} out; where the recipe sets it, choose another recipe or data.{option}=null",
            )
    return load(TASKS, config.task, key="data.task")(config)
