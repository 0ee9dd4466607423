"""``-m``: one run for every combination of swept values, one after the other, each in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from os.path import expanduser
from pathlib import Path
from typing import Any

from dora_cli.cli.run import FAILURE, INTERRUPTED, TERMINATED, USER_MISTAKE, Terminated
from dora_cli.errors import UserError

COMMAND = [sys.executable, "-m", "dora_cli.cli.train"]
LONGEST_NAME = 150  # file systems take 255 bytes


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


def sweep(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> int:
    """Run all jobs. A failed one does not end the sweep; Ctrl-C and SIGTERM do.

    Returns:
        0 if all jobs succeeded, else the worst of their codes (1 over 2), or 130 / 143 where it was ended.

    Raises:
        UserError: nothing to sweep over, or a mistyped name or key.
    """
    jobs = plan(overrides, config_dirs)
    results: list[Result] = []
    ended = 0
    for number, job in enumerate(jobs, 1):
        if ended:
            results.append(Result(job, None, ""))
            continue
        print(f"sweep: job {number} of {len(jobs)}: {job.name}", flush=True)
        code, ended = _run(job, config_dirs)
        results.append(Result(job, code, main_metric(job.out) if code == 0 else ""))
    print("\n".join(table(results)))
    codes = {result.code for result in results if result.code}
    return ended or (USER_MISTAKE if codes == {USER_MISTAKE} else FAILURE if codes else 0)


def plan(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> list[Job]:
    """The jobs of a sweep, in the order of the swept keys, the last one changing fastest.

    Ranges come from the command line and from ``hydra.sweeper.params`` of the recipe, the command line winning.

    Raises:
        UserError: nothing to sweep over, several sweeps of ``out``, a mistyped name.
    """
    from dora_cli.cli.help import PART_KEYS
    from dora_cli.config.check import Key, find_key, known_keys
    from dora_cli.config.layers import Layer, find_recipe
    from dora_cli.config.overrides import parse_sweep, split, sweep_values
    from dora_cli.config.recipes import GROUPS, check_choice, missing_recipe, search_folders
    from dora_cli.config.schema import PART_GROUPS, Config

    folders, keys = search_folders(config_dirs), known_keys(Config)
    parents = [split(o)[1] for o in overrides if "=" in o and split(o)[0] == "out"]
    rest = [o for o in overrides if "=" not in o or split(o)[0] != "out"]
    shared, axes = parse_sweep(rest, keys, folders)
    fixed = dict(map(split, shared))
    recipes = axes.get("recipe") or ([fixed["recipe"]] if "recipe" in fixed else [])
    if not recipes:
        raise missing_recipe(folders)
    for group in (g for g in GROUPS if g in axes):
        for name in axes[group]:
            check_choice(group, name, folders)
    for recipe in recipes:
        for key, leaf in Layer("", "", find_recipe(recipe, folders).source).sweep().items():
            if key in fixed or key in axes:
                continue
            if len(recipes) > 1:
                raise UserError(f"recipe {recipe} is a sweep itself, and cannot be swept over", where=leaf.where)
            text = ",".join(map(str, leaf.value)) if isinstance(leaf.value, list) else str(leaf.value)
            values = sweep_values(key, text, is_text=key in keys and keys[key].is_text, folders=folders)
            axes[key] = values or [text]
    # A mistyped key is one message, not one a job. The options of parts are known only to the jobs, which import torch.
    documented = keys | {key: Key(key, str) for key in PART_KEYS}
    for key in (*fixed, *axes):
        if key not in GROUPS and key.split(".")[0] not in PART_GROUPS:
            find_key(key, documented)
    if not axes:
        raise UserError("-m needs something to sweep over", hint="give a key several values, such as budget=0.1,0.2")

    name = find_recipe(recipes[0], folders).name if len(recipes) == 1 else ""
    parent = Path(expanduser(parents[-1])) if parents else Path("runs", name, "sweep-" + "-".join(axes))
    jobs = []
    for combination in product(*axes.values()):
        swept = [f"{key}={value}" for key, value in zip(axes, combination, strict=True)]
        folder = parent / folder_name(swept)
        jobs.append(Job(",".join(swept), [*shared, *swept, f"out={folder}"], folder))
    if len({job.out for job in jobs}) < len(jobs):
        raise UserError("two jobs of this sweep would share a folder", hint="a key has one value twice")
    return jobs


def folder_name(swept: Sequence[str]) -> str:
    """``budget=0.1,seed=2``: the swept keys and values with everything that file systems dislike replaced."""
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join(text.replace("'", "").replace('"', "") for text in swept))
    if len(name) > LONGEST_NAME:
        import hashlib

        name = name[: LONGEST_NAME - 9] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name


def _run(job: Job, config_dirs: Sequence[str]) -> tuple[int, int]:
    """Run one job to its end, whatever happens to us meanwhile: it saves what it has.

    Returns:
        Its exit code, and what ends the sweep (0, 130 or 143).
    """
    arguments = [*job.overrides, *(word for folder in config_dirs for word in ("--config-dir", folder))]
    child = subprocess.Popen([*COMMAND, *arguments])
    ended = 0
    while True:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            ended = INTERRUPTED
            if not _at_terminal():  # there, Ctrl-C has reached the job as well, and a second one would kill it
                child.send_signal(signal.SIGINT)
        except Terminated:
            ended = TERMINATED
            child.send_signal(signal.SIGTERM)
        else:
            # A job that a signal ended has a negative code here; a shell calls it 128 + signal.
            return (128 - code if code < 0 else code), ended


def _at_terminal() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False


def main_metric(out: Path) -> str:
    """``accuracy 0.931`` from ``summary.json``: the metric that chose the checkpoint. Empty where there is none."""
    try:
        summary: Mapping[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        best = summary["best"]
        return f"{best['name']} {best['value']:.4g}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def table(results: Sequence[Result]) -> list[str]:
    """One line a job: name, exit code, main metric."""
    rows = [("job", "exit", "metric")]
    rows += [(r.job.name, "-" if r.code is None else str(r.code), r.metric) for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{job:<{widths[0]}}  {code:>{widths[1]}}  {metric}".rstrip() for job, code, metric in rows]
    return ["", *lines, f"folders: {results[0].job.out.parent}"]
