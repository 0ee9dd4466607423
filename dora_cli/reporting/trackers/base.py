"""What a tracker is, and how a run's records reach those that were asked for.

A record of ``metrics.jsonl`` becomes numbers with names, ``SPLIT/KEY`` (``train/loss``, ``validation/accuracy``,
``allocation/alive``), and ``ranks/MODULE`` for each module at an allocation event.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

from dora_cli.errors import UserError
from dora_cli.registry import load
from dora_cli.reporting.events import read_metrics
from dora_cli.reporting.trackers import STATE, TRACKERS

Scalar = float | int | bool | str | None
Mark = tuple[int, set[str]]  # a step, and the splits whose records of that step have been sent
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # how a run ends; a stopped one is resumed


def tool(module: str) -> Any:
    """A tool's module, of no type: whether it is installed here must not matter to those who check types."""
    return import_module(module)


class Tracker(Protocol):
    """One tool's run. Any exception that a method raises turns the tracker off, and never ends the run.

    ``packages`` are the modules that must be installed.
    """

    packages: ClassVar[Sequence[str]]

    @classmethod
    def check(cls, *, offline: bool) -> None:
        """Refuse what can be known before a run.

        Raises:
            UserError: something of the user's is missing, such as a key.
        """

    def start(self, folder: Path, project: str, name: str, config: Mapping[str, Scalar], known: str | None) -> str:
        """Begin a run, or go on with the one that is ``known``.

        Args:
            folder: the run's, for local files.
            config: dotted key → value of the whole configuration.

        Returns:
            By what the run is known to the tool.
        """

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take numbers of one optimizer step; steps never go back."""

    def close(self, summary: Mapping[str, float], state: str) -> None:
        """End: ``summary`` is empty unless the state is ``finished``."""


def check(names: Sequence[str], *, offline: bool) -> None:
    """Refuse trackers that can't be had, before anything is loaded.

    Raises:
        UserError: an unknown name, a package or a key that is missing.
    """
    for name in names:
        kind: type[Tracker] = load(TRACKERS, name, key="track.to")
        lacking = [package for package in kind.packages if find_spec(package) is None]
        if lacking:
            raise UserError(
                f"track.to={name} needs the package {lacking[0]}, which is not installed",
                hint=f"pip install 'dora-cli[{name}]', or leave {name} out of track.to",
            )
        kind.check(offline=offline)


class Trackers:
    """The trackers of one run; a context that starts and closes them.

    Args:
        names: those asked for.
        folder: the run's.
        project: what the tools file the run under.
        name: what they call it.
        config: dotted key → value of the whole configuration.
        offline: whether nothing may reach for the network.
        say: takes a line for the user.

    Attributes:
        state: how the run has ended, for whoever knows to say; until then it has failed.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Scalar],
        offline: bool,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.project, self.name, self.config, self.say = folder, project, name, config, say
        self.summary: Mapping[str, Any] = {}
        self.state = FAILED
        self._running: dict[str, Tracker] = {n: load(TRACKERS, n, key="track.to")(offline=offline) for n in names}
        self._known = self._read()
        # A run that goes back to a checkpoint repeats records; those that were written before have been sent as well.
        self._written = read_metrics(folder / "metrics.jsonl")
        last = max((record["step"] for record in self._written), default=0)
        self._repeated: Mark = last, {record["split"] for record in self._written if record["step"] == last}
        self._marks: dict[str, Mark] = {}  # the last that each has been sent

    def __enter__(self) -> "Trackers":
        # On disk "until" is the mark of a tracker that has been sent less than metrics.jsonl has, or more: what lies
        # behind the checkpoint is cut off there now. Without one it has been sent just that.
        for name, known in self._known.items():
            known.setdefault("until", _listed(self._repeated))
            self._marks[name] = known["until"][0], set(known["until"][1])
        self._write()  # those left out today too: they will have missed this
        for name in list(self._running):
            self._marks.setdefault(name, (0, set()))
            self._try(name, partial(self._start, name))
            for record in self._written:  # what it has missed
                if self._send(name, record):
                    self._mark(name)
        return self

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand one record of ``metrics.jsonl`` on, unless it repeats one from before the run was interrupted."""
        for name in list(self._running):
            if self._send(name, record) and self._known[name].pop("until", None):
                self._write()

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is finished, and this is its ``summary.json``."""
        self.summary, self.state = summary, FINISHED

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        summary = flat(self.summary) if self.state == FINISHED else {}
        for name in list(self._running):
            self._try(name, lambda tracker: tracker.close(summary, self.state))

    def _start(self, name: str, tracker: Tracker) -> None:
        known = self._known.get(name, {}).get("id")
        self._known[name] = {"id": tracker.start(self.folder, self.project, self.name, self.config, known)}
        self._mark(name)

    def _send(self, name: str, record: Mapping[str, Any]) -> bool:
        """Send what it has not been sent yet. Returns whether that was done."""
        step, split = record["step"], record["split"]
        last, splits = self._marks[name]
        if name not in self._running or step < last or (step == last and split in splits):
            return False
        sent = self._try(name, lambda tracker: tracker.log(step, numbers(record)))
        if sent:
            self._marks[name] = step, {split} | (splits if step == last else set())
        return sent

    def _try(self, name: str, act: Callable[[Tracker], object]) -> bool:
        """A tool's failure is not the run's: from then on it is off, until the run is resumed."""
        try:
            act(self._running[name])
        except Exception as error:
            del self._running[name]
            told = str(error).strip().splitlines() or [""]
            self.say(f"track.to={name} is off from here on: {type(error).__name__}: {told[0][:200]}")
            if name in self._known:
                self._mark(name)
            return False
        return True

    def _mark(self, name: str) -> None:
        self._known[name]["until"] = _listed(self._marks[name])
        self._write()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known: dict[str, dict[str, Any]] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet; or cut short, and then a new run of theirs begins
            return {}
        return known

    def _write(self) -> None:
        if not self._known:
            return
        partial = self.folder / f".{STATE}.tmp"  # one run per folder: nobody else writes it
        partial.write_text(json.dumps(self._known), encoding="utf-8")
        partial.replace(self.folder / STATE)


def _listed(mark: Mark) -> list[Any]:
    return [mark[0], sorted(mark[1])]


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of ``metrics.jsonl``, by name. Lists count; text and what is not finite is left out."""
    split, standing = record["split"], record.get("standing", {})
    rest = {k: v for k, v in record.items() if k not in ("step", "split", "ranks", "standing")}
    rest |= {k: standing[k] for k in ("lowest_kept", "highest_lost") if k in standing}  # the line, not who stood where
    return flat(rest, f"{split}/") | flat(record.get("ranks", {}), "ranks/")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every finite number of nested mappings, by its path with slashes; lists by their length."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, list | tuple):
            found[prefix + key] = len(value)
        elif isinstance(value, int | float) and math.isfinite(value):
            found[prefix + key] = value
    return found
