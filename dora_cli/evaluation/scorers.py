"""What an evaluation adds up of a task's outputs, batch by batch, and what it remembers of every row."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dora_cli.data.tasks.base import Task
from dora_cli.errors import UserError
from dora_cli.evaluation import SCORERS, TOKENS, WRITTEN
from dora_cli.evaluation.generate import answer, generate, last_turn, search, turn_ends
from dora_cli.evaluation.metrics import build_metrics
from dora_cli.processes import World
from dora_cli.registry import load


class Scorer(Protocol):
    """One evaluation of one split.

    ``taken``: the names of the attributes that grow with every batch, lists of tensors or of what JSON can say, and
    counts. Those of several scorers, joined, are those of one that has taken in all.
    """

    taken: ClassVar[tuple[str, ...]]
    writes: bool  # whether the model is run once more, to write

    def update(self, model: Any, outputs: Tensor, batch: dict[str, Tensor], references: Sequence[Any] = ()) -> None:
        """Take in a batch: what ``Task.loss`` gave with this model, what it was given, and ``Encoded.references``."""

    def metrics(self) -> dict[str, float]:
        """The task's metrics of everything taken in, by name."""

    def predictions(self) -> list[dict[str, Any]]:
        """One object a row, in the order in which rows were taken in; only where they were to be kept.

        Of windows (``Encoded.windows_of``): one object, with its ``id``, for each of their rows, in the split's order.
        """


def build_scorer(task: Task, *, keep: bool = False) -> Scorer:
    """A fresh scorer for a task.

    Args:
        task: its ``kind`` and ``metric_names`` say what is measured.
        keep: remember what was said to every row.

    Raises:
        UserError: a metric that is unknown, or none of this kind of task.
    """
    scorer: Scorer = load(SCORERS, task.kind, key="data.task")(task, keep)
    return scorer


def measured(task: Any, known: Sequence[str]) -> list[str]:
    """The metrics that a task names, but for the loss, which is measured anyway.

    Raises:
        UserError: one is not among those that are known of such a task.
    """
    names = [name for name in task.metric_names if name != "loss"]
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"data.metrics: '{unknown[0]}' is no metric of data.task={task.name}",
            hint=f"choose from {', '.join(known)}",
        )
    return names


class LabelScorer:
    """One value a row: a label, or a number."""

    taken: ClassVar[tuple[str, ...]] = ("predicted", "expected")
    writes = False

    def __init__(self, task: Any, keep: bool) -> None:
        self.task = task
        build_metrics(task.metric_names, task.num_labels)  # a wrong name, before there is anything to measure
        self.predicted: list[Tensor] = []
        self.expected: list[Tensor] = []

    def update(self, model: Any, outputs: Tensor, batch: dict[str, Tensor], references: Sequence[Any] = ()) -> None:
        self.predicted.append(self.task.predict(outputs))  # on the device: read when the metrics are
        self.expected.append(self.task.reference(batch))

    def metrics(self) -> dict[str, float]:
        found = build_metrics(self.task.metric_names, self.task.num_labels)
        found.update(torch.cat(self.predicted), torch.cat(self.expected))
        return found.compute()

    def predictions(self) -> list[dict[str, Any]]:
        said, meant = (self.task.decode(torch.cat(values).cpu()) for values in (self.predicted, self.expected))
        return [{"prediction": p, "reference": r} for p, r in zip(said, meant, strict=True)]


def join(scorer: Scorer, world: World) -> None:
    """Let a process's scorer take in what those of all others have."""
    if world.alone:
        return
    tensors, rest = {}, {}
    for name in scorer.taken:
        values = getattr(scorer, name)
        if isinstance(values, list) and values and isinstance(values[0], Tensor):
            tensors[name] = torch.cat(values)
        else:
            rest[name] = values
    parcels = world.gather(tensors, rest)
    for name in scorer.taken:
        first, *more = ([theirs[name]] if name in theirs else others[name] for theirs, others in parcels)
        setattr(scorer, name, sum(more, first))


class TokenScorer:
    """Tokens that are to be predicted one by one: (n, 3) of each row the summed loss, how many, and how many right.

    ``perplexity`` is e to the mean loss of a token, over all tokens of all rows. ``exact_match`` is the share of
    rows of which the model, given all before the last learned stretch, writes what ``data.answer`` finds in it.
    """

    taken: ClassVar[tuple[str, ...]] = ("rows", "texts")
    written: tuple[str, ...] = WRITTEN  # the metrics for which the model has to write

    def __init__(self, task: Any, keep: bool) -> None:
        self.task = task
        self.names = measured(task, (*TOKENS, *self.written))
        self.writes = bool(set(self.written) & set(self.names))
        self.rows: list[Tensor] = []
        self.texts: list[Sequence[str]] = []  # what was written, and what should have been

    def update(self, model: Any, outputs: Tensor, batch: dict[str, Tensor], references: Sequence[Any] = ()) -> None:
        self.rows.append(outputs.detach())
        if self.writes:
            self._write(model, batch, references)

    def metrics(self) -> dict[str, float]:
        loss, count, right = torch.cat(self.rows).cpu().double().sum(0).tolist()
        mean = loss / max(count, 1)
        values = {
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "token_accuracy": right / max(count, 1),
        }
        if self.writes:
            values |= self._written_metrics()
        return {name: values[name] for name in self.names}

    def predictions(self) -> list[dict[str, Any]]:
        rows = torch.cat(self.rows).cpu().double().tolist()
        facts = [
            {"loss": round(loss / max(count, 1), 6), "tokens": int(count), "right": int(right)}
            for loss, count, right in rows
        ]
        if not self.writes:
            return facts
        texts = [{"prediction": said, "reference": meant} for said, meant in self.texts]
        return [{**text, **fact} for text, fact in zip(texts, facts, strict=True)]

    def _write(self, model: Any, batch: dict[str, Tensor], references: Sequence[Any]) -> None:
        tokenizer = self.task.tokenizer
        real = batch["attention_mask"].bool()
        turns = [last_turn(batch["input_ids"][i][real[i]], batch["labels"][i][real[i]]) for i in range(len(real))]
        whole = real.sum(1) < self.task.config.max_length  # the end of a row that was cut is no end
        ends = turn_ends(
            tokenizer, [turn for (_, turn), is_whole in zip(turns, whole.tolist(), strict=True) if is_whole]
        )
        prompts, longest = [before for before, _ in turns], self.task.config.max_new_tokens
        written = generate(model, tokenizer, prompts, longest, ends, search(self.task.config))
        for said, (_, meant) in zip(written, turns, strict=True):
            texts = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (said, meant.tolist()))
            self.texts.append((next(texts), next(texts)))

    def _written_metrics(self) -> dict[str, float]:
        return {"exact_match": sum(self._matches(*texts) for texts in self.texts) / max(len(self.texts), 1)}

    def _matches(self, said: str, meant: str) -> bool:
        pattern = self.task.answer_pattern
        expected = answer(meant, pattern)
        return expected is not None and answer(said, pattern) == expected
