"""The plan as it is printed: the curve against its counts, the table of modules, widths, and plain text."""

import re

import pytest

from dora_cli.allocation.schedules import CubicLate
from dora_cli.reporting.plan_view import curve, plan_view
from dora_cli.reporting.terminal import plain


def schedule(total=200, start=30, end=100, interval=10, first=360, last=72):
    shape = CubicLate(start, end)
    window = shape.window(total)
    steps = sorted({*range(start, end, interval), end})
    events = [[t, shape.count(t, window, first, last)] for t in steps]
    return {"counts": "components", "start": start, "end": end, "steps": total, "first": first, "events": events}


def heights(lines, width):
    """The bars of a curve, in eighths of a line, by column; its scale left out."""
    left = len(lines[-2]) - len(lines[-2].lstrip())
    blocks = [line[left : left + width].ljust(width) for line in lines[:-2]]
    return [sum(max(" ▁▂▃▄▅▆▇█".find(row[i]), 0) for row in blocks) for i in range(width)], left


def test_bars_are_as_high_as_what_lives_then():
    known = schedule()
    lines = curve(known, 360, width=40, unicode=True)
    found, left = heights(lines, 40)
    for i, height in enumerate(found):
        step = 1 + round(i * 199 / 39)
        count = next((c for t, c in reversed(known["events"]) if t <= step), 360)
        assert abs(height - 40 * count / 360) <= 0.5, step
    axis = lines[-2][left:]
    assert axis.index("━") == round(29 * 39 / 199) and axis.rindex("━") == round(99 * 39 / 199)
    assert lines[-1].split() == ["1", "30", "100", "200"]
    assert max(map(len, lines)) <= 50


def test_it_grows_as_well_and_knows_runs_of_a_step():
    known = schedule(first=24, last=36)
    found, _ = heights(curve(known, 24, width=40, unicode=True), 40)
    assert found == sorted(found) and found[-1] == 40
    one = schedule(total=1, start=1, end=1)
    assert curve(one, 360, width=40, unicode=True)[-1].split() == ["1"]


def test_ascii_where_there_is_nothing_else():
    lines = curve(schedule(), 360, width=40, unicode=False)
    assert "\n".join(lines).isascii() and "#" in lines[0] and "=" in lines[-2]


@pytest.mark.parametrize("width", [60, 80])
def test_the_plan_fits_and_has_no_blanks_at_line_ends(width):
    sections = {
        "run": {"out": "/a/very/long/path" * 8},
        "adapter": {"start": "360 components"},
        "schedule": {"window": "steps 30 to 100 of 200"},
        "warning": {"1": "[bold]no markup[/bold], 漢字 " * 9},
    }
    group = {"pattern": "model.layers.*.self_attn.q_proj", "shape": [64, 64], "names": ["a", "b"]}
    facts = {
        "schedule": schedule(),
        "adapter": {"units_start": 360},
        "modules": [{**group, "units": [1, 3], "parameters": [128, 384]}],
    }
    text = plain(plan_view(sections, facts, with_modules=True, width=width), width)
    lines = text.splitlines()
    assert max(len(line) + len(re.findall(r"[一-龥]", line)) for line in lines) <= width
    assert lines == [line.rstrip() for line in lines]
    assert "[bold]no" in text and "\033" not in text
    assert re.search(r"[a-z_]+ +2 +64×64 +1 to 3 +128 to 384", text)
