"""A run folder, read back: what reports and comparisons are made of. Reads whatever is there of an unfinished run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dora_cli.errors import UserError
from dora_cli.reporting.events import ALLOCATION, read_metrics

Record = dict[str, Any]
CONFIG, REPORT = "config.yaml", "report.html"
NO_EVALUATION = ("train", ALLOCATION, "skipped")  # the splits of metrics.jsonl that are none
PARTS = ("adapter", "importance", "schedule", "allocator", "regularizer")


@dataclass(frozen=True)
class Run:
    """One run: its configuration, the records of ``metrics.jsonl`` in order, and its summary where it is finished."""

    folder: Path
    recipe: str
    config: Mapping[str, Any]  # nested, as in config.yaml, without its defaults list
    choices: Mapping[str, str]  # config group → choice: model, data, method and the five parts
    config_text: str
    records: list[Record]
    summary: Mapping[str, Any] | None
    comments: Mapping[str, str] = field(default_factory=dict)  # what config.yaml says in its head: recipe, command

    @property
    def method(self) -> str:
        return self.choices.get("method", "?")

    @property
    def budget(self) -> str:
        """As it was asked for; empty where it does not apply."""
        asked = self.config.get("budget") if self.summary is None else self.summary["budget"]["requested"]
        if self.summary is None and self.choices.get("schedule") == "auto":  # the recipe's is not worked towards
            asked = "auto"
        return "" if asked is None else str(asked)

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @property
    def title(self) -> str:
        """``quickstart · dora · budget 0.2 · seed 1``."""
        budget = f"budget {self.budget}" if self.budget else ""
        return " · ".join(part for part in (self.recipe, self.method, budget, f"seed {self.seed}") if part)

    @cached_property
    def events(self) -> list[Record]:
        """Allocation events: step, budget, alive, params, ranks, and where units were scored, ``standing``."""
        return [r for r in self.records if r["split"] == ALLOCATION]

    @cached_property
    def splits(self) -> list[str]:
        """The evaluated splits, in the order in which they first came."""
        return list(dict.fromkeys(r["split"] for r in self.records if r["split"] not in NO_EVALUATION))

    @cached_property
    def steps(self) -> int:
        """Optimizer steps taken so far."""
        return max((int(r["step"]) for r in self.records), default=0)

    @property
    def window(self) -> tuple[int, int] | None:
        """The steps of the first and of the last allocation event."""
        return (self.events[0]["step"], self.events[-1]["step"]) if self.events else None

    @property
    def ranks(self) -> dict[str, int]:
        """Living components of every target module: at the end, or at the last event so far."""
        if self.summary is not None:
            return dict(self.summary["ranks"])
        return dict(self.events[-1]["ranks"]) if self.events else {}

    @property
    def main_metric(self) -> str | None:
        """The name of the metric that chose the checkpoint; of an unfinished run, of the first one evaluated."""
        if self.summary is not None and self.summary["best"]:
            return str(self.summary["best"]["name"])
        of_first = next((r for r in self.records if r["split"] not in NO_EVALUATION), {})
        return next((k for k in of_first if k not in ("step", "split", "loss")), "loss" if of_first else None)

    def curve(self, split: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number of one split, those that were not finite left out."""
        found = [(r["step"], r[name]) for r in self.records if r["split"] == split and r.get(name) is not None]
        return [step for step, _ in found], [float(value) for _, value in found]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: there is no run, or one of its files is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder", where="it has no config.yaml")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged", where=str(error).splitlines()[0]) from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged", where="it holds no keys")
    comments = dict(_comments(text))
    return Run(
        folder=folder,
        recipe=comments.get("recipe", "?"),
        choices=dict(_choices(config.pop("defaults", None))),
        config=config,
        config_text=text,
        records=read_metrics(folder / "metrics.jsonl"),
        summary=_summary(folder / "summary.json"),
        comments=comments,
    )


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        budget, train = summary["budget"], summary["train"]
        known = isinstance(summary["ranks"], dict) and "params_end" in budget and "seconds" in train
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged", where=f"{type(error).__name__}: {error}") from None
    if not known:
        raise UserError(f"{path} is damaged", where="it is not what dora-train writes")
    return dict(summary)


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """``#   recipe: quickstart`` in the head of the file."""
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        name, colon, value = line.lstrip("# ").partition(": ")
        if colon and name.isidentifier():
            yield name, value.strip()


def _choices(defaults: Any) -> Iterator[tuple[str, str]]:
    for entry in defaults if isinstance(defaults, list) else []:
        if isinstance(entry, dict):
            for group, choice in entry.items():
                yield str(group).removeprefix("override ").removeprefix("/"), str(choice)
