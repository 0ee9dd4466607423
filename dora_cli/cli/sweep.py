"""``-m``: one run for every combination of swept values, or every proposal of a search, each a process of its own."""

import json
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from os.path import expanduser
from pathlib import Path
from types import FrameType
from typing import Any

from dora_cli.cli.launchers import Command, Launcher, build_launcher, require, with_processes
from dora_cli.cli.resweep import Action, action
from dora_cli.cli.run import FAILURE, INTERRUPTED, TERMINATED, USER_MISTAKE, print_error
from dora_cli.cli.run_folder import SUMMARY
from dora_cli.errors import UserError

COMMAND = [sys.executable, "-m", "dora_cli.cli.train"]
LONGEST_NAME = 150  # file systems take 255 bytes
UPLOAD = "push_to_hub"
LOGS = ".sweep"  # in the sweep's folder: what jobs say that do not speak in this terminal


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its overrides, and its folder, named after the swept keys."""

    name: str
    overrides: list[str]
    out: Path


@dataclass(frozen=True)
class Result:
    """How a job ended; None where it was not started."""

    job: Job
    code: int | None
    metric: str
    action: Action = "start"

    @property
    def ran(self) -> bool:
        """Whether what lies in the job's folder is its result: it succeeded, and did more than to say its plan."""
        return self.code == 0 and self.action != "plan"


@dataclass(frozen=True)
class Ranges:
    """A sweep, read: the overrides that all jobs share, the values of every swept key, and the jobs' parent folder."""

    shared: list[str]
    axes: dict[str, Any]  # key → config.overrides.Values
    parent: Path

    def job(self, values: Sequence[str], name: str | None = None) -> Job:
        """The job that takes these values, one a swept key, its folder called ``name`` or after them."""
        swept = [f"{key}={value}" for key, value in zip(self.axes, values, strict=True)]
        folder = self.parent / folder_name([name] if name else swept)
        return Job(",".join(swept), [*self.shared, *swept, f"out={folder}"], folder)


def sweep(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> int:
    """Run all jobs. A failed one does not end the sweep; Ctrl-C and SIGTERM do, after the jobs have saved.

    Returns:
        0 if all jobs succeeded, else the worst of their codes (1 over 2), or 130 / 143 where it was ended.

    Raises:
        UserError: nothing to sweep over, a mistyped name or key, a package that is missing.
    """
    from dora_cli.config.launching import take

    launching, overrides = take(overrides)
    if launching.search is not None:
        require("optuna", "hydra/sweeper=optuna")
        ranges = read(overrides, config_dirs, search=True)
    else:
        jobs = plan(overrides, config_dirs)
        ranges = Ranges([], {}, jobs[0].out.parent)
    runner = Runner(build_launcher(launching, ranges.parent), launching.options, config_dirs)
    with runner.stopped_by_signals():
        if launching.search is None:
            results = runner.run(jobs)
        else:
            from dora_cli.cli.search import search

            results = search(ranges, launching, runner)
    print("\n".join([*table(results), "the same command goes on from here"] if runner.ended else ending(results)))
    codes = {result.code for result in results if result.code}
    return runner.ended or (USER_MISTAKE if codes == {USER_MISTAKE} else FAILURE if codes else 0)


class Runner:
    """Runs jobs through a launcher, and says what becomes of them.

    Attributes:
        ended: 130 or 143 where a signal ended the sweep, else 0.
        at_once: how many jobs the launcher runs at a time.
    """

    def __init__(self, launcher: Launcher, options: Any, config_dirs: Sequence[str] = ()) -> None:
        self._launcher, self._options = launcher, options
        self._config_dirs = config_dirs
        self.at_once = launcher.at_once
        self.ended = 0

    def run(self, jobs: Sequence[Job], first: int = 1, of: int | None = None) -> list[Result]:
        """Run jobs, and give their results in the same order.

        Args:
            jobs: what to run; a finished one is left alone, an interrupted one goes on.
            first: the number of the first one, for what is said.
            of: how many there are in all; default all of these.
        """
        titles = [f"sweep: job {first + i} of {of or len(jobs)}: {job.name}" for i, job in enumerate(jobs)]
        results = [self._before(job, title) for job, title in zip(jobs, titles, strict=True)]
        left = [index for index, result in enumerate(results) if result.code is None]
        commands = [self._command(results[index]) for index in left]

        def begun(position: int) -> None:
            log = commands[position].log
            print(titles[left[position]] + (f"  (see {log})" if log else ""), flush=True)

        for position, code in self._launcher.run(commands, begun):
            result = replace(results[left[position]], code=code)
            job, metric = result.job, main_metric(result.job.out) if result.ran else ""
            results[left[position]] = replace(result, metric=metric)
            if not self._launcher.shows and code is not None:
                lines = [f"sweep: {job.name} ended: {metric or code}", *_last_words(commands[position], code)]
                print("\n  ".join(lines), flush=True)
        return results

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the sweep: the launcher hands them on, and all that runs saves and ends."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.ended = INTERRUPTED if number == signal.SIGINT else TERMINATED
            self._launcher.stop(number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _before(self, job: Job, title: str) -> Result:
        """What there is to say of a job without running it: its result where it is finished, else no code."""
        try:
            found = action(job.out, job.overrides, self._config_dirs)
        except UserError as error:
            print(title, flush=True)
            print_error(error.message, error.where, error.hint)
            return Result(job, USER_MISTAKE, "")
        if found == "skip":
            print(f"{title}: finished before", flush=True)
            return Result(job, 0, main_metric(job.out), found)
        return Result(job, None, "", found)

    def _command(self, result: Result) -> Command:
        job = result.job
        more = ["resume=true"] if result.action == "resume" else []
        flags = [word for folder in self._config_dirs for word in ("--config-dir", folder)]
        words = with_processes([*COMMAND, *job.overrides, *more, *flags], self._options)
        return Command(words, "" if self._launcher.shows else str(job.out.parent / LOGS / f"{job.out.name}.log"))


def _last_words(command: Command, code: int) -> list[str]:
    """The end of what a failed job said."""
    log = Path(command.log)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if code and log.exists() else []
    return [line for line in lines if line.strip()][-4:]


def plan(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> list[Job]:
    """The jobs of a sweep, in the order of the swept keys, the last one changing fastest.

    Raises:
        UserError: nothing to sweep over, several sweeps of ``out``, a mistyped name.
    """
    ranges = read(overrides, config_dirs)
    jobs = [ranges.job(combination) for combination in product(*ranges.axes.values())]
    if len({job.out for job in jobs}) < len(jobs):
        raise UserError("two jobs of this sweep would share a folder", hint="a key has one value twice")
    return jobs


def read(overrides: Sequence[str], config_dirs: Sequence[str] = (), *, search: bool = False) -> Ranges:
    """What a sweep is over: from the command line and from ``hydra.sweeper.params`` of the recipe, the former winning.

    Args:
        overrides: as typed, Hydra's own keys taken out.
        config_dirs: the user's own folders.
        search: whether intervals may stand for values.

    Raises:
        UserError: nothing to sweep over, several sweeps of ``out``, a mistyped name, an upload.
    """
    from dora_cli.cli.part_keys import part_keys
    from dora_cli.config.check import Key, check_range, check_type, find_key, known_keys
    from dora_cli.config.layers import Layer, find_recipe
    from dora_cli.config.overrides import Interval, parse_sweep, split, sweep_values
    from dora_cli.config.recipes import GROUPS, check_choice, missing_recipe, search_folders
    from dora_cli.config.schema import PART_GROUPS, Config

    folders, keys = search_folders(config_dirs), known_keys(Config)
    parents = [split(o)[1] for o in overrides if "=" in o and split(o)[0] == "out"]
    rest = [o for o in overrides if "=" not in o or split(o)[0] != "out"]
    shared, axes = parse_sweep(rest, keys, folders, search=search)
    fixed = dict(map(split, shared))
    recipes: Any = axes.get("recipe") or ([fixed["recipe"]] if "recipe" in fixed else [])
    if not recipes:
        raise missing_recipe(folders)
    for group in (g for g in GROUPS if g in axes):
        for name in _listed(group, axes[group]):
            check_choice(group, name, folders)
    for recipe in recipes:
        layer = Layer("", "", find_recipe(recipe, folders).source)
        said = {leaf.key: leaf for leaf in layer.leaves()}.get(UPLOAD)
        if said and said.value is not None and UPLOAD not in fixed:
            raise _no_upload(said.where)
        for key, leaf in layer.sweep().items():
            if key in fixed or key in axes:
                continue
            if len(recipes) > 1:
                raise UserError(f"recipe {recipe} is a sweep itself, and cannot be swept over", where=leaf.where)
            text = ",".join(map(str, leaf.value)) if isinstance(leaf.value, list) else str(leaf.value)
            is_text = key in keys and keys[key].is_text
            axes[key] = sweep_values(key, text, is_text=is_text, folders=folders, search=search) or [text]
    # A mistyped key is one message, not one a job. The options of parts are known only to the jobs, which import torch.
    documented = keys | {key: Key(key, str) for group in PART_GROUPS for key in part_keys(group)}
    for key in (*fixed, *axes):
        if key not in GROUPS and key.split(".")[0] not in PART_GROUPS:
            find_key(key, documented)
    if UPLOAD in axes or fixed.get(UPLOAD, "null").lower() != "null":
        raise _no_upload()
    shared.append(f"{UPLOAD}=null")  # whatever files the jobs are made up of
    for key, values in axes.items():
        if isinstance(values, Interval) and key in keys:
            for end in (values.low, values.high):
                check_type(keys[key], end)
                check_range(keys[key], end)
    if not axes:
        what = "search" if search else "sweep over"
        raise UserError(f"-m needs something to {what}", hint="give a key several values, such as budget=0.1,0.2")
    name = find_recipe(recipes[0], folders).name if len(recipes) == 1 else ""
    parent = Path(expanduser(parents[-1])) if parents else Path("runs", name, "sweep-" + "-".join(axes))
    return Ranges(shared, axes, parent)


def _no_upload(where: str | None = None) -> UserError:
    later = "upload the one you choose: dora-train recipe=… out=ITS_FOLDER resume=true push_to_hub=NAME"
    return UserError(
        "push_to_hub is for one run: the jobs of -m would go into one repository, over each other",
        where=where,
        hint=f"add push_to_hub=null\n{later}" if where else later,
    )


def _listed(group: str, values: Any) -> list[str]:
    if not isinstance(values, list):
        raise UserError(f"{group} has names, not numbers", hint=f"write {group}=a,b")
    return values


def folder_name(swept: Sequence[str]) -> str:
    """``budget=0.1,seed=2``: the swept keys and values with everything that file systems dislike replaced."""
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join(text.replace("'", "").replace('"', "") for text in swept))
    if len(name) > LONGEST_NAME:
        import hashlib

        name = name[: LONGEST_NAME - 9] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name


def main_result(out: Path) -> tuple[str, float] | None:
    """Name and value, from ``summary.json``, of the metric that chose the checkpoint. None where there is none."""
    try:
        summary: Mapping[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        best = summary["best"]
        return str(best["name"]), float(best["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main_metric(out: Path) -> str:
    """``accuracy 0.931``: the result in words, empty where there is none."""
    result = main_result(out)
    return f"{result[0]} {result[1]:.4g}" if result else ""


def ending(results: Sequence[Result]) -> list[str]:
    """What a sweep ends with: the jobs that failed, and the comparison of the others, which is also written.

    Where there is nothing to compare, or that fails, a line a job: a sweep is not worse for it.
    """
    finished = [result.job.out for result in results if result.ran and (result.job.out / SUMMARY).exists()]
    failed = [result for result in results if result.code != 0]
    if not finished:
        return table(results)
    try:
        from dora_cli.cli.report_run import COMPARISON, comparison
        from dora_cli.reporting.runs import read_run

        parent = results[0].job.out.parent
        lines = comparison([read_run(out) for out in finished], parent / COMPARISON)
    except Exception as error:
        return ["", f"no comparison: {str(error) or type(error).__name__}", *table(results)]
    return [*(table(failed)[:-1] if failed else []), *lines, f"folders: {parent}"]


def table(results: Sequence[Result]) -> list[str]:
    """One line a job: name, exit code, main metric."""
    rows = [("job", "exit", "metric")]
    rows += [(r.job.name, "-" if r.code is None else str(r.code), r.metric) for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{job:<{widths[0]}}  {code:>{widths[1]}}  {metric}".rstrip() for job, code, metric in rows]
    return ["", *lines, f"folders: {results[0].job.out.parent}"]
