"""The plan of a run for people: aligned lines, a table of modules, and the schedule as a small plot."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

INDENT, KEYS = 2, 12  # columns before the keys, and of them
HEIGHT = 5  # lines of the plot
NARROW, WIDE = 20, 56  # columns of the plot
EIGHTHS = " ▁▂▃▄▅▆▇█"
PLAIN = "  ....::#"  # where the terminal knows ASCII alone


def plan_view(
    sections: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, Any],
    *,
    with_modules: bool,
    unicode: bool = True,
    width: int = 80,
) -> RenderableType:
    """The whole plan.

    Args:
        sections: section → key → text; printed in this order.
        facts: the same in numbers (docs/formats.md), of which the table and the plot are drawn.
        with_modules: whether to list the target modules.
        unicode: whether blocks can be printed.
        width: columns that there are.
    """
    shown: list[RenderableType] = []
    for title, rows in sections.items():
        warns = title == "warning"
        shown.append(Text(title, style="bold yellow" if warns else "bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(width=KEYS, style="yellow" if warns else "dim")
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(Text(key), Text(value, overflow="fold"))  # brackets are no markup here
        if title == "schedule":
            room = min(WIDE, max(NARROW, width - INDENT - KEYS - 12))
            plot = curve(facts["schedule"], facts["adapter"]["units_start"], width=room, unicode=unicode)
            table.add_row(Text("plot"), Text("\n".join(plot), no_wrap=True, overflow="crop"))
        shown.append(Padding(table, (0, 0, 0, INDENT)))
        if title == "adapter" and with_modules and facts["modules"]:
            shown.append(Padding(module_table(facts["modules"]), (0, 0, 0, INDENT)))
    return Group(*shown)


def module_table(groups: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line for each kind of target module: how many, their shape, and what each starts with."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.add_column("modules", overflow="fold", header_style="dim")
    for name in ("count", "shape", "units", "parameters"):
        table.add_column(name, justify="right", header_style="dim", no_wrap=True)
    for group in groups:
        d_out, d_in = group["shape"]
        cells = (f"{len(group['names'])}", f"{d_out}×{d_in}", _span(group["units"]), _span(group["parameters"]))
        table.add_row(Text(group["pattern"], overflow="fold"), *cells)
    return table


def curve(schedule: Mapping[str, Any], start: int, *, width: int, unicode: bool) -> list[str]:
    """What lives at each step, as bars from 0 up; below them the steps, and the window in which events fall.

    Args:
        schedule: the plan's: ``steps``, ``first``, ``events`` as [step, count], ``counts``.
        start: units at the start, where units are counted.
        width: columns of the plot, scale left out.
        unicode: whether blocks can be printed.

    Returns:
        Lines of at most ``width`` + 10 columns.
    """
    total, events = schedule["steps"], schedule["events"]
    first = schedule["first"] if schedule["counts"] == "parameters" else start
    knots = [(1, first), *((step, count) for step, count in events)]
    width = min(width, total)
    counts = [_at(knots, 1 + round(i * (total - 1) / max(width - 1, 1))) for i in range(width)]
    highest = max(1, *(count for _, count in knots))
    levels = [max(round(count / highest * HEIGHT * 8), 1 if count else 0) for count in counts]
    blocks = EIGHTHS if unicode else PLAIN
    label = max(len(_short(count)) for _, count in knots)
    lines = []
    for row in reversed(range(HEIGHT)):
        bars = "".join(blocks[min(max(level - 8 * row, 0), 8)] for level in levels)
        scale = _short(highest) if row == HEIGHT - 1 else "0" if row == 0 else ""
        lines.append(f"{scale:>{label}} {bars}".rstrip())
    last = counts[-1]
    lines[-1 - min(levels[-1] // 8, HEIGHT - 1)] += f" {_short(last)}"
    begin, end = (_column(step, total, width) for step in (events[0][0], schedule["end"]))
    line, mark = ("─", "━") if unicode else ("-", "=")
    lines.append(" " * (label + 1) + "".join(mark if begin <= i <= end else line for i in range(width)))
    ticks = [(0, "1"), (begin, f"{events[0][0]:,}"), (end, f"{schedule['end']:,}"), (width - 1, f"{total:,}")]
    return [*lines, " " * (label + 1) + _ticks(ticks)]


def _at(knots: Sequence[tuple[int, int]], step: int) -> int:
    return next((count for (_, count), (after, _) in pairwise(knots) if step < after), knots[-1][1])


def _column(step: int, total: int, width: int) -> int:
    return round((step - 1) * (width - 1) / max(total - 1, 1))


def _ticks(ticks: Sequence[tuple[int, str]]) -> str:
    """Texts at their columns; one for which there is no room is left out."""
    line = ""
    for column, text in ticks:
        if not line or column > len(line):
            line = line.ljust(column) + text
    return line


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**5, "k")):
        if count >= size:
            return f"{count / (1000 if letter == 'k' else size):.3g}{letter}"
    return str(count)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
