"""Counts of METHODS 0.8 and 11, and the window rules of DESIGN 6."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_cli.allocation import SCHEDULES
from dora_cli.allocation.schedules import (
    Constant,
    Cosine,
    CubicEarly,
    CubicLate,
    Exponential,
    Geometric,
    Linear,
    OneShot,
    Power,
    Schedule,
    Sigmoid,
    Step,
)
from dora_cli.errors import UserError
from dora_cli.registry import load

MOVING = [CubicLate(), CubicEarly(), Linear(), Power(exponent=0.7, late=False), Cosine(), Exponential(rate=-4.0)]
MOVING += [Exponential(), Geometric(), Sigmoid(), Sigmoid(steepness=60.0), Step(), OneShot()]


def counts(schedule: Schedule, first: int, last: int, xs: list[float]) -> list[int]:
    return [schedule.between(first, last, x) for x in xs]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (CubicLate(), [18, 18, 17, 15, 12]),
        (CubicEarly(), [18, 15, 13, 12, 12]),
        (Linear(), [18, 16, 15, 14, 12]),
        (Cosine(), [18, 17, 15, 13, 12]),
    ],
)
def test_three_modules_from_six_to_four_count_as_in_the_fixture(schedule: Schedule, expected: list[int]) -> None:
    assert counts(schedule, 18, 12, [0, 0.25, 0.5, 0.75, 1]) == expected


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (CubicLate(), [11.94, 11.5, 10.31]),
        (CubicEarly(), [9.69, 8.5, 8.06]),
        (Linear(), [11, 10, 9]),
        (Cosine(), [11.41, 10, 8.59]),
        (Exponential(rate=5.0), [9.13, 8.30, 8.07]),
        (Sigmoid(steepness=10.0), [11.72, 10, 8.28]),
        (Power(exponent=3.0), [11.94, 11.5, 10.31]),
    ],
)
def test_average_ranks_match_the_table_of_shapes(schedule: Schedule, expected: list[float]) -> None:
    ranks = [8 + 4 * (1 - schedule.progress(x)) for x in (0.25, 0.5, 0.75)]
    assert ranks == pytest.approx(expected, abs=0.005)


def test_geometric_keeps_a_constant_ratio() -> None:
    # 12000 · (2/3)^x
    assert counts(Geometric(), 12000, 8000, [0.25, 0.5, 0.75]) == [10843, 9798, 8853]


@pytest.mark.parametrize("schedule", MOVING, ids=lambda s: type(s).__name__)
def test_every_shape_is_monotone_with_exact_ends(schedule: Schedule) -> None:
    values = counts(schedule, 864, 86, [i / 1000 for i in range(1001)])
    assert values[0] == 864
    assert values[-1] == 86
    assert all(a >= b for a, b in pairwise(values))


def test_early_and_late_cubic_mirror_each_other() -> None:
    for i in range(101):
        x = i / 100
        assert CubicLate().progress(x) == pytest.approx(1 - CubicEarly().progress(1 - x), abs=1e-12)


@given(total=st.integers(1, 5000), first=st.integers(1, 900), share=st.floats(0, 1), interval=st.integers(1, 97))
def test_count_is_the_start_before_the_window_and_the_budget_from_its_end(
    total: int, first: int, share: float, interval: int
) -> None:
    last = round(first * share)
    schedule = CubicLate()
    window = schedule.window(total)
    assert 0 <= window.start <= window.end <= total
    assert window.end >= 1
    for step in {1, max(window.start, 1), window.end, total, (window.start + window.end) // 2 or 1}:
        count = schedule.count(step, window, first, last)
        assert last <= count <= first
        if step >= window.end:
            assert count == last
        elif step <= window.start:
            assert count == first


def test_window_floors_shares_and_takes_whole_numbers_as_steps() -> None:
    window = CubicLate(start=0.15, end=0.5).window(70)
    assert (window.start, window.end) == (10, 35)
    assert window.start_exact == pytest.approx(10.5)
    window = Linear(start=7, end=1.0).window(70)
    assert (window.start, window.end) == (7, 70)
    assert CubicLate(start=0.0, end=0.001).window(10).end == 1


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.5), (3, 200), (1.5, 1.0), (90, 0.5)])
def test_a_window_that_does_not_fit_is_refused(start: float, end: float) -> None:
    with pytest.raises(UserError, match=r"schedule\.(start|end)"):
        CubicLate(start=start, end=end).window(100)


def test_step_points_must_rise() -> None:
    with pytest.raises(UserError, match="points"):
        Step(points=[[0.5, 0.5], [0.4, 0.9]])
    assert counts(Step(points=[[0.2, 0.5], [0.8, 0.9]]), 100, 0, [0.1, 0.2, 0.79, 0.8, 1.0]) == [100, 50, 50, 10, 0]


def test_constant_never_moves_and_every_listed_schedule_loads() -> None:
    assert Constant().count(50, Constant().window(50), 30, 30) == 30
    assert len(SCHEDULES) >= 11
    for name in SCHEDULES:
        assert issubclass(load(SCHEDULES, name, key="schedule"), Schedule)
