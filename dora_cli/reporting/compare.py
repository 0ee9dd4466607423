"""Runs compared: what is a repetition of what, means over seeds, who is best, and who is not worth their parameters.

Runs that differ in nothing but the seed are one *group*. Groups whose metric is measured on the same rows are one
*setting*; across settings nothing is compared.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dora_cli.config.differences import flat
from dora_cli.data.tasks import higher_is_better
from dora_cli.errors import UserError
from dora_cli.registry import did_you_mean
from dora_cli.reporting.rank_map import short_tails
from dora_cli.reporting.runs import PARTS, Run

# What decides which rows a metric is measured on, and what is asked of them.
ROWS = ("task", "name", "config", "path", "splits", "columns", "labels", "max_eval_samples", "holdout")
# These count tokens: another tokenizer, length or prompt is another measure.
BY_TOKENS = ("loss", "perplexity", "token_accuracy")
LONGEST_VALUE = 24  # characters of a value in a label
MOST_KEYS = 3  # that a label names


@dataclass(frozen=True)
class Mean:
    """A mean over runs, with the standard deviation of one run (n − 1 below); None where there is but one."""

    mean: float
    sd: float | None
    n: int


def mean_of(values: Sequence[float]) -> Mean | None:
    """None of no values."""
    if not values:
        return None
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed: the finished ones, one a seed and by seed, and those that are not."""

    label: str
    config: Mapping[str, Any]  # dotted key → value, without the seed and what makes no difference
    finished: list[Run]
    unfinished: list[Run]

    @property
    def runs(self) -> list[Run]:
        return [*self.finished, *self.unfinished]

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def budget(self) -> str:
        return self.runs[0].budget

    @property
    def suffix(self) -> str:
        """What the label says beside the method."""
        return self.label.removeprefix(self.method)

    @cached_property
    def metric(self) -> Mean | None:
        return self.mean(value_of)

    @cached_property
    def params(self) -> Mean | None:
        return self.mean(params_of)

    def mean(self, number: Callable[[Run], float | None]) -> Mean | None:
        """Of a number over the finished runs that have it."""
        return mean_of([value for run in self.finished if (value := number(run)) is not None])

    @property
    def ranks(self) -> dict[str, float]:
        """Module → rank at the end, the mean over seeds."""
        maps = [run.ranks for run in self.finished]
        names = dict.fromkeys(name for ranks in maps for name in ranks)
        return {name: statistics.fmean(ranks.get(name, 0) for ranks in maps) for name in names}


@dataclass(frozen=True)
class Setting:
    """Groups that may be compared: the same metric on the same rows."""

    data: str
    metric: str
    groups: list[Group]

    @property
    def higher(self) -> bool:
        return higher_is_better(self.metric)

    @cached_property
    def measured(self) -> list[Group]:
        """The groups that have a mean."""
        return [group for group in self.groups if group.metric is not None]

    @cached_property
    def best(self) -> Group:
        """The group with the best mean, the smaller one where two are equal."""
        return min(self.measured, key=lambda g: (-self._quality(g), _mean(g.params)))

    def is_near(self, group: Group) -> bool:
        """Whether a group's mean lies within one standard deviation, the larger of the two, of the best one's."""
        if group is self.best or group.metric is None or self.best.metric is None:
            return group is self.best
        noise = max(group.metric.sd or 0.0, self.best.metric.sd or 0.0)
        return abs(group.metric.mean - self.best.metric.mean) <= noise

    @cached_property
    def front(self) -> list[Group]:
        """Groups by parameters that no other one beats: as good with fewer parameters, or better with no more."""
        points = [(_mean(g.params), self._quality(g)) for g in self.measured]
        kept = [group for group, is_in in zip(self.measured, pareto(points), strict=True) if is_in]
        return sorted(kept, key=lambda g: _mean(g.params))

    def references(self, baseline: str | None) -> dict[str, Group]:
        """Label → the group that this one is compared with: the best, or ``baseline`` (a method or a label).

        Of a method with several groups it is the one at the same budget; there may be none.
        """
        if baseline is None:
            return {group.label: self.best for group in self.measured}
        called = [group for group in self.measured if baseline in (group.label, group.method)]
        found = {}
        for group in self.measured:
            same = called if len(called) == 1 else [other for other in called if other.budget == group.budget]
            if len(same) > 1:  # told apart by another key
                same = [other for other in same if other.suffix == group.suffix]
            if len(same) == 1:
                found[group.label] = same[0]
        return found

    def differing(self) -> dict[str, list[Any]]:
        """Key → its value in each group, of the keys that are not the same in all; None where a group has none."""
        return _differing(self.groups)

    def _quality(self, group: Group) -> float:
        assert group.metric is not None
        return group.metric.mean if self.higher else -group.metric.mean


def check_baseline(baseline: str | None, settings: Sequence[Setting]) -> None:
    """Refuse what is neither a method nor a label of any group.

    Raises:
        UserError: naming those that are.
    """
    names = list(dict.fromkeys(name for s in settings for g in s.measured for name in (g.method, g.label)))
    if baseline is not None and baseline not in names:
        raise UserError(f"baseline={baseline} is none of these runs", hint=did_you_mean(baseline, names))


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (cost, quality) is dominated by none: no other is at least as good in both and better in one."""
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]


def paired(group: Group, reference: Group) -> Mean | None:
    """The metric's difference to ``reference`` over the seeds that both have run; None where they share none."""
    theirs = {run.seed: value_of(run) for run in reference.finished}
    found = []
    for run in group.finished:
        ours, other = value_of(run), theirs.get(run.seed)
        if ours is not None and other is not None:
            found.append(ours - other)
    return None if group is reference else mean_of(found)


def compare(runs: Sequence[Run], free: tuple[str, ...]) -> tuple[list[Setting], list[str]]:
    """Sort runs into settings and groups, both in the order in which they first come, a method's groups by size.

    Args:
        runs: finished or not.
        free: beginnings of keys that make no difference (logging, saving, workers).

    Returns:
        The settings, and a sentence for each run that is in none or was not counted.

    Raises:
        UserError: no run is finished.
    """
    notes: list[str] = []
    by_setting: dict[str, list[Run]] = defaultdict(list)
    waiting = []
    for run in runs:
        if run.summary is None:
            waiting.append(run)
        elif value_of(run) is None:
            notes.append(f"{run.folder} is left out: it has no evaluation of what it saved")
        else:
            by_setting[repr(_measure(run))].append(run)
    if not by_setting:
        raise UserError("none of these runs is finished with a result", hint="resume=true goes on with a run")
    for run in waiting:
        home = next((known for known in by_setting.values() if _rows(known[0]) == _rows(run)), None)
        if home is None:
            notes.append(f"{run.folder} is left out: it is not finished, and none on the same data is")
        else:
            home.append(run)
    settings = []
    titles = _titles([found[0] for found in by_setting.values()])
    for title, found in zip(titles, by_setting.values(), strict=True):
        metric = found[0].main_metric
        assert metric is not None
        settings.append(Setting(title, metric, _groups(found, free, notes)))
    return settings, notes


def saved_of(run: Run) -> Mapping[str, Any] | None:
    """The evaluation whose weights a finished run saved: its step, and name and value of the main metric."""
    if run.summary is None or not run.summary["best"]:
        return None
    which = (run.config.get("save") or {}).get("which", "best")
    saved: Mapping[str, Any] = run.summary.get(which) or run.summary["best"]
    return saved


def value_of(run: Run) -> float | None:
    """The main metric of what a finished run saved; None where it has none, or not a finite one."""
    saved = saved_of(run)
    return float(saved["value"]) if saved is not None and saved["value"] is not None else None


def params_of(run: Run) -> float | None:
    """Parameters of a finished run's adapter at the end, heads apart; of ``full`` and ``bitfit``, what was trained."""
    if run.summary is None:
        return None
    at_end = run.summary["budget"]["params_end"]
    return float(at_end or run.summary["trained_params"] - run.summary["head_params"])


# ---- which run belongs where ---------------------------------------------------------------------------------------
def _rows(run: Run) -> dict[str, Any]:
    data = run.config.get("data") or {}
    return {f"data.{key}": data.get(key) for key in ROWS}


def _measure(run: Run) -> dict[str, Any]:
    """All that must be the same for two runs' main metrics to be compared."""
    name, data = run.main_metric, run.config.get("data") or {}
    by_tokens = {
        "model": (run.config.get("model") or {}).get("name"),
        "data.max_length": data.get("max_length"),
        "data.template": data.get("template"),
    }
    return {"metric": name, **_rows(run), **(by_tokens if name in BY_TOKENS else {})}


def _titles(runs: Sequence[Run]) -> list[str]:
    """What each setting's data are called, from a run of each; those of one name with what they differ in."""
    plain = [(_data(run), run.main_metric) for run in runs]
    titles = []
    for run, name in zip(runs, plain, strict=True):
        same = [_measure(other) for other, called in zip(runs, plain, strict=True) if called == name]
        ours = _measure(run)
        more = ", ".join(f"{key}={value}" for key, value in ours.items() if any(o[key] != value for o in same))
        titles.append(_one_line(f"{name[0]} ({more})" if more else name[0]))
    return titles


def _data(run: Run) -> str:
    """``glue/sst2``, or the last part of a path."""
    data = run.config.get("data") or {}
    if data.get("path"):
        return str(data["path"]).rstrip("/").rpartition("/")[2]
    return "/".join(str(data[key]) for key in ("name", "config") if data.get(key)) or run.recipe


def _groups(runs: Sequence[Run], free: tuple[str, ...], notes: list[str]) -> list[Group]:
    together: dict[str, list[Run]] = defaultdict(list)
    configs = {}
    for run in runs:
        config = {"method": run.method, **flat(run.config, (*free, "seed"))}
        key = repr(sorted(config.items()))
        together[key].append(run)
        configs[key] = config
    found = []
    for key, members in together.items():
        finished: dict[int, Run] = {}
        for run in (r for r in members if r.summary is not None):
            first = finished.setdefault(run.seed, run)
            if first is not run:
                notes.append(f"{run.folder} is not counted: it repeats {first.folder}, seed and all")
        group = Group("", configs[key], sorted(finished.values(), key=lambda r: r.seed), [])
        group.unfinished.extend(run for run in members if run.summary is None)
        found.append(group)
    labels = _labels(found)
    methods = list(dict.fromkeys(group.method for group in found))
    named = [Group(labels[i], g.config, g.finished, g.unfinished) for i, g in enumerate(found)]
    return sorted(named, key=lambda g: (methods.index(g.method), _mean(g.params)))


def _labels(groups: Sequence[Group]) -> list[str]:
    """``dora r4``; where that is several groups, also the first keys in which those differ."""
    plain = [f"{group.method} {group.budget}".strip() for group in groups]
    labels = list(plain)
    for label in {label for label in plain if plain.count(label) > 1}:
        same = [i for i, other in enumerate(plain) if other == label]
        keys = _telling([groups[i] for i in same])
        for i in same:
            values = (shortened(groups[i].config.get(key)) for key in keys)
            shown = (f"{short}={value}" for short, value in zip(short_tails(keys), values, strict=True))
            labels[i] = " ".join([label, *shown])
    seen: dict[str, int] = defaultdict(int)
    for i, label in enumerate(labels):
        seen[label] += 1
        labels[i] = label if seen[label] == 1 else f"{label} ({seen[label]})"
    return labels


def _telling(groups: Sequence[Group]) -> list[str]:
    """The first keys by which groups are told apart: one that does it alone, or a few."""
    differing = {key: [shortened(value) for value in values] for key, values in _differing(groups).items()}
    alone = next((key for key, values in differing.items() if len(set(values)) == len(groups)), None)
    if alone is not None:
        return [alone]
    keys: list[str] = []
    for key, values in differing.items():
        known = [[differing[k][i] for k in keys] for i in range(len(groups))]
        more = [[*row, value] for row, value in zip(known, values, strict=True)]
        if len(keys) < MOST_KEYS and len(set(map(tuple, more))) > len(set(map(tuple, known))):
            keys.append(key)
    return keys


def _differing(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The parts first, since most other keys follow from them."""
    keys = list(dict.fromkeys(key for group in groups for key in group.config))
    first = ("method", "budget", *(f"{part}.name" for part in PARTS))
    keys.sort(key=lambda key: first.index(key) if key in first else len(first))
    values = {key: [group.config.get(key) for group in groups] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def shortened(value: Any) -> str:
    """A value as it stands in a label."""
    text = str(value).lower() if isinstance(value, bool) else "–" if value is None else _one_line(str(value))
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _mean(value: Mean | None) -> float:
    """For sorting: what is not known comes last."""
    return math.inf if value is None else value.mean
