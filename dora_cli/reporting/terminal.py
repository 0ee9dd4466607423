"""The terminal view: one live panel on a terminal, plain lines in a pipe, and every line in ``train.log``."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


def duration(seconds: float) -> str:
    """``1:05:09`` or ``5:09``."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def number(value: float) -> str:
    """A metric or loss in four significant digits."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


@contextmanager
def to_whoever_looks() -> Iterator[None]:
    """Where nobody does any more (a closed terminal, a pipe whose reader has ended) output goes nowhere from now on.

    A run must not be lost over that, and ``train.log`` has it all.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        gone, null = os.fstat(sys.stdout.fileno()), os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            if os.path.samestat(os.fstat(stream.fileno()), gone):
                os.dup2(null, stream.fileno())
        os.close(null)


class _Console(Console):
    @property
    def draws(self) -> bool:
        """Whether lines can be drawn over: with FORCE_COLOR a pipe is a terminal to rich, and gets colours alone."""
        return self.file.isatty() and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        """Rich would end the process."""
        raise


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, which goes away at the end; nothing in a pipe.

    Yields:
        What is called with how many of ``total`` more are done.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = _Console(highlight=False)
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.draws)
    number = bar.add_task(what, total=total)

    def advance(done: int) -> None:
        with to_whoever_looks():
            bar.update(number, advance=done, refresh=True)

    with to_whoever_looks():
        bar.start()
    try:
        yield advance
    finally:
        with to_whoever_looks():
            bar.stop()


def trial(decision: Mapping[str, Any]) -> str:
    """What an event of ``schedule=auto`` has decided."""
    what = {True: "kept", False: "undone"}.get(decision["committed"])
    losses = f"held-out loss {number(decision['loss'])}, best {number(decision['best'])}"
    waits = not decision["learned"] and decision["below"] is not None
    if what:
        more = f"; waits for {number(decision['below'])}" if waits else ""
        return f"cut of {decision['tried']} {what}: {losses}{more}"
    if not waits:
        return f"no cut to decide: {losses}"
    return f"nothing tried before the held-out loss is below {number(decision['below'])}: {number(decision['loss'])}"


class View:
    """Shows a run as it goes.

    Args:
        total_steps: optimizer steps of the run.
        start_units: units at the start.
        most_units: units that live at most; 0 where nothing is allocated.
        final_units: what the budget leaves, as text.
        metric: name of the metric that chooses the best.
        log: file for plain lines, or None.
        first_step: the step to go on from.
        final_step: the step of the final choice of what lives; 0 where none is made.
        word: what the count of units says of them.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_units: int,
        most_units: int,
        final_units: str,
        metric: str,
        log: Path | None,
        first_step: int = 0,
        final_step: int = 0,
        word: str = "alive",
    ) -> None:
        self.console = _Console(highlight=False)
        self.total, self.final_units, self.metric = total_steps, final_units, metric
        self.start_units, self.most_units, self.word = start_units, most_units, word
        self.log_file: TextIO | None = log.open("a", encoding="utf-8") if log else None
        self.first_step = self.step = first_step
        self.final_step = final_step
        self.started = time.monotonic()
        self.record: dict[str, Any] = {}
        self.latest: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.live: Live | None = None

    def __enter__(self) -> "View":
        self.started = time.monotonic()
        if self.console.draws:
            self.live = Live(self._panel(), console=self.console, auto_refresh=False)
            with to_whoever_looks():
                self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            with to_whoever_looks():
                self.live.stop()
            self.live = None
        if self.log_file is not None:
            self.log_file.close()
            self.log_file = None

    def line(self, text: str) -> None:
        """One sentence: above the live panel, or as a plain line; and in the log file."""
        self.log(text)
        with to_whoever_looks():
            if self.live is not None:
                self.live.console.print(Text(text))
            else:
                print(text, flush=True)

    def train(self, record: Mapping[str, Any]) -> None:
        self.record = dict(record)
        self.step = record["step"]
        if self.live is not None:
            with to_whoever_looks():
                self.live.update(self._panel(), refresh=True)
            self.log(self._train_line())
        else:
            self.line(self._train_line())

    def event(self, record: Mapping[str, Any]) -> None:
        """In the log each; elsewhere the final choice alone, since lines of training say how many units there are, and
        what was decided by trial."""
        self.record["alive"] = record["alive"]
        if "auto" in record:
            self.line(f"step {record['step']}/{self.total}  {trial(record['auto'])}")
        if record["step"] != self.final_step:
            self.log(
                f"step {record['step']}  allocation: {record['alive']} units {self.word}, budget {record['budget']}"
            )
            return
        ranks = record["ranks"].values()
        where = f" in {sum(rank > 0 for rank in ranks)} of {len(ranks)} modules" if ranks else ""
        self.line(f"step {record['step']}/{self.total}  final choice: {record['alive']} units {self.word}{where}")

    def evaluated(self, record: Mapping[str, Any], better: bool) -> None:
        self.latest = dict(record)
        if better:
            self.best = dict(record)
        parts = [
            f"{split} " + "  ".join(f"{name} {number(value)}" for name, value in metrics.items())
            for split, metrics in record["metrics"].items()
        ]
        self.line(f"step {record['step']}/{self.total}  " + "   ".join(parts) + ("   best so far" if better else ""))

    def time_left(self) -> str:
        done = self.step - self.first_step
        if done <= 0:
            return "?"
        return duration((time.monotonic() - self.started) / done * (self.total - self.step))

    def _budget(self) -> str:
        count = self.record.get("alive", self.start_units)
        return f"{self.word} {count}/{self.most_units}" if self.most_units else ""

    def _train_line(self) -> str:
        r = self.record
        parts = [
            f"step {r['step']}/{self.total}",
            self._budget(),
            f"loss {number(r['loss'])}",
            f"lr {r['learning_rate']:.2e}",
            f"{r['samples_per_second']:,.0f} samples/s",
            f"{self.time_left()} left",
        ]
        return "  ".join(p for p in parts if p)

    def _panel(self) -> Panel:
        r = self.record
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(width=16)
        bar.add_column(ratio=1)
        bar.add_column(width=14, justify="right")
        bar.add_row(
            f"step {self.step}/{self.total}",
            ProgressBar(total=self.total, completed=self.step),
            f"{self.time_left()} left",
        )
        alive = r.get("alive", self.start_units)
        if self.most_units:
            bar.add_row(
                "budget",
                ProgressBar(total=self.most_units, completed=alive, finished_style="bar.complete"),
                f"{alive}/{self.most_units}",
            )
        facts = []
        if r.get("loss") is not None:
            facts += [f"loss {number(r['loss'])}", f"lr {r['learning_rate']:.2e}"]
            facts += [f"{r['samples_per_second']:,.0f} samples/s"]
        if self.latest is not None:
            facts.append(f"{self.metric} {number(self.latest['value'])}")
        if self.best is not None:
            facts.append(f"best {number(self.best['value'])}")
        if self.most_units:
            facts.append(f"→ {self.final_units}")
        return Panel(Group(bar, Text("   ".join(facts))), title="dora-train", title_align="left")

    def log(self, text: str) -> None:
        """One or more lines, in the log file alone."""
        if self.log_file is not None:
            print(text, file=self.log_file, flush=True)


def show(what: RenderableType) -> None:
    """Print something that is laid out: on a terminal with its styles, in a pipe plain, without blanks at the end."""
    console = _Console(highlight=False)
    with to_whoever_looks():
        if console.is_terminal:
            console.print(what)
        else:
            print(plain(what, console.width))
        sys.stdout.flush()


def plain(what: RenderableType, width: int = 80) -> str:
    """The text of something that is laid out: no control codes, no blanks at the end of lines."""
    file = StringIO()
    Console(file=file, width=width, height=25, color_system=None, force_terminal=False, highlight=False).print(what)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def room() -> tuple[int, bool]:
    """The columns that stdout has, and whether it can print blocks."""
    console = _Console()
    try:
        "█▁─".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return console.width, False
    return console.width, True


def summary_view(summary: Mapping[str, Any], files: Mapping[str, Path], next_steps: Sequence[str]) -> RenderableType:
    """The closing table: what came out, what is left of the budget, where the files are, and what to do with them."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for split, metrics in summary["metrics"].items():
        table.add_row(split, "   ".join(f"{name} {number(value)}" for name, value in metrics.items()))
    best, budget, train = summary["best"], summary["budget"], summary["train"]
    if best:
        table.add_row("from", f"step {best['step']} ({best['name']} {number(best['value'])})")
    if budget["params_end"]:
        link = "of" if budget["components_end"] <= budget["components_start"] else "grown from"
        table.add_row(
            "adapter",
            f"{budget['components_end']:,} {link} {budget['components_start']:,} {summary['unit']}, "
            f"{budget['params_end']:,} {link} {budget['params_start']:,} parameters",
        )
    table.add_row(
        "training",
        f"{train['steps']:,} steps in {duration(train['seconds'])}, {train['samples_per_second']:,.0f} samples/s, "
        f"peak {train['peak_rss_mib']:,} MiB",
    )
    for name, path in files.items():
        table.add_row(name, Text(str(path), overflow="fold"))
    for i, command in enumerate(next_steps):
        table.add_row("" if i else "next", Text(command, overflow="fold"))
    return table


def print_scores(scores: Iterable[tuple[str, str, float, float | None, int]]) -> None:
    """A table of (task, metric, value, standard error, rows); a task's name stands once."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("task", "metric"):
        table.add_column(name, overflow="fold", header_style="dim")
    for name in ("value", "± error", "rows"):
        table.add_column(name, justify="right", header_style="dim")
    before = ""
    for task, metric, value, error, rows in scores:
        shown = "" if task == before else task
        table.add_row(shown, metric, number(value), "" if error is None else number(error), f"{rows:,}" if rows else "")
        before = task
    show(table)
