"""Finds runs, compares them, writes the comparison's folder and says what came of it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from os.path import expanduser
from pathlib import Path

from dora_cli.checkpoints.atomic import atomic_folder
from dora_cli.cli.folder_lists import matches, split_list
from dora_cli.config.differences import FREE_ON_RESUME
from dora_cli.errors import UserError
from dora_cli.reporting.compare import check_baseline, compare
from dora_cli.reporting.compare_page import INDEX, OURS, write_comparison
from dora_cli.reporting.compare_tables import cautions, text_table, wrapped
from dora_cli.reporting.runs import CONFIG, Run, read_run

COMPARISON = "comparison"  # the folder, where no other is named
SHOWN = 3  # folders that a note names


def report_runs(runs: Sequence[str], out: str | None = None, baseline: str | None = None) -> int:
    """Compare runs. Returns the exit code.

    Args:
        runs: values of ``runs=``.
        out: the comparison's folder; default ``comparison`` in the runs' common folder.
        baseline: a method or a group that all are compared with; default the best.

    Raises:
        UserError: no runs there, none finished, or ``out`` holds something else.
    """
    folders, others = find_runs(runs)
    place = Path(expanduser(out)) if out else common_folder(folders) / COMPARISON
    read, notes = _read(folders)
    if others:
        named = ", ".join(map(str, others[:SHOWN])) + (", …" if len(others) > SHOWN else "")
        notes.insert(0, f"{_count(len(others), 'folder')} without a run skipped: {named}")
    print("\n".join(comparison(read, place, notes, baseline)))
    return 0


def comparison(runs: Sequence[Run], place: Path, notes: Sequence[str] = (), baseline: str | None = None) -> list[str]:
    """Write the comparison to ``place``, whole or not at all. Returns what there is to say about it.

    Raises:
        UserError: no run is finished, an unknown baseline, or ``place`` holds something else.
    """
    check_place(place)
    settings, more = compare(runs, FREE_ON_RESUME)
    check_baseline(baseline, settings)
    references = [setting.references(baseline) for setting in settings]
    notes = [*notes, *more]
    with atomic_folder(place, replace=True) as folder:
        write_comparison(folder, settings, notes, references, place)
    if len(settings) > 1:
        notes.append(f"{len(settings)} settings (data and metric), each compared by itself")
    lines = _noted(notes)
    for setting, of_setting in zip(settings, references, strict=True):
        lines += ["", *text_table(setting, of_setting), *_noted(cautions(setting))]
    to = f"to {baseline}" if baseline else "to the best"
    lines += ["", "* best mean, ~ within one standard deviation of it; ± is that of one run"]
    lines += [*wrapped(f"difference: {to}, of runs with the same seed"), f"page: {place / INDEX}"]
    return lines


def find_runs(values: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The run folders that the values of ``runs=`` name, and folders that were named by a pattern and are none.

    A folder that is no run stands for the runs in it, at any depth. What lies inside a run is no run of its own.

    Raises:
        UserError: something named is not there, or holds no run.
    """
    runs: dict[Path, None] = {}
    others = []
    for word in (word for value in values for word in split_list(value)):
        found = matches(word)
        if not found:
            raise UserError(
                f"runs={word}: there is no such folder", hint="name run folders, or a pattern such as 'runs/sweep/*'"
            )
        inside = {path: list(_runs_in(path)) for path in found}
        if not any(inside.values()):
            raise UserError(f"runs={word} holds no run", where="a run folder has a config.yaml of dora-train's")
        for path, of_path in inside.items():
            runs |= dict.fromkeys(of_path)
            if not of_path and not _is_comparison(path):
                others.append(path)
    whole = {path.resolve() for path in runs}

    def is_part(path: Path) -> bool:
        """Whether it lies in a run: checkpoints have a config.yaml, too."""
        return not whole.isdisjoint(path.resolve().parents)

    return [path for path in runs if not is_part(path)], [path for path in others if not is_part(path)]


def common_folder(folders: Sequence[Path]) -> Path:
    """The folder in which all runs lie, relative where they were named so."""
    parents = [str(folder.parent) for folder in folders]
    try:
        return Path(os.path.commonpath(parents))
    except ValueError:  # relative and absolute ones
        return Path(os.path.commonpath([os.path.abspath(parent) for parent in parents]))


def check_place(place: Path) -> None:
    """Refuse a place that holds something else than a comparison.

    Raises:
        UserError: it is a file, or a folder with other files.
    """
    if place.exists() and not place.is_dir():
        raise UserError(f"out={place} is a file", hint="choose another out=DIR")
    if place.is_dir() and any(place.iterdir()) and not _is_comparison(place):
        raise UserError(f"out={place} holds something that is no comparison", hint="choose a new or empty out=DIR")


def _is_comparison(place: Path) -> bool:
    names = [path.name for path in place.iterdir()]
    return INDEX in names and all(OURS.fullmatch(name) for name in names)


def _runs_in(path: Path) -> Iterator[Path]:
    """The folder itself where it is a run, else the runs below it."""
    if (path / CONFIG).is_file():
        yield path.resolve() if path.name in ("", "..") else path  # only by its name can one tell the folder it lies in
        return
    for below in sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and p.name[0] != "."):
        yield from _runs_in(below)


def _read(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and a sentence for each that is damaged."""
    runs, notes = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            notes.append(f"{folder} is left out: {error.message} ({error.where})")
    return runs, notes


def _noted(notes: Iterable[str]) -> list[str]:
    return [line for note in notes for line in wrapped(f"note: {note}")]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
