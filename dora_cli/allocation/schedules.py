"""How much may live at step t (METHODS 11). A schedule is a shape and the window it runs in; counting is exact.

The shape is given as ``progress(x)``: the share of the way from the start to the final budget that is covered at
x ∈ [0, 1] of the window; METHODS' g(x) is 1 − progress(x). It is 0 at 0, 1 at 1 and never falls.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from dora_cli.errors import UserError

MOST_CUT = 0.25  # of what lives, to which cuts grow
Steps = int | float  # a float in (0, 1] is a share of the run, a whole number is steps


def to_steps(value: Steps, total: int, *, key: str) -> int:
    """Steps that ``value`` means in a run of ``total``: ``floor(value · total)`` for a share, else ``value`` itself.

    Raises:
        UserError: a fraction above 1, or more steps than the run has.
    """
    if isinstance(value, float) and not value.is_integer() and value > 1:
        raise UserError(f"{key}={value} is neither a share of the run (0 to 1) nor a whole number of steps")
    if isinstance(value, float) and value <= 1:
        return math.floor(value * total)
    if value > total:
        raise UserError(f"{key}={int(value)} lies beyond the run, which has {total} steps")
    return int(value)


@dataclass(frozen=True)
class Window:
    """The resolved window of a run: steps count from 1; ``start`` may be 0, ``1 ≤ end ≤ total``, ``start ≤ end``.

    ``start_exact`` is start · total before rounding, for those who reproduce code that never rounds it.
    """

    start: int
    end: int
    total: int
    start_exact: float
    end_exact: float

    def x(self, step: int) -> float:
        """Position in the window, clamped to [0, 1]."""
        if self.end == self.start:
            return 1.0 if step >= self.end else 0.0
        return min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)


@dataclass
class Schedule:
    """Base of all shapes."""

    start: Steps = field(default=0.15, metadata={"help": "first allocation event: share of the run, or step", "low": 0})
    end: Steps = field(default=0.5, metadata={"help": "final choice: share of the run, or step", "low": 0})

    moves: ClassVar[bool] = True
    one_event: ClassVar[bool] = False  # nothing happens before the end
    own: ClassVar[frozenset[str]] = frozenset()  # options for which methods' values, meant for other shapes, don't hold
    finds_budget: ClassVar[bool] = False  # there is none to work towards: what is left is found by trial

    def __post_init__(self) -> None:
        if isinstance(self.start, int) == isinstance(self.end, int) and self.start > self.end:
            raise UserError(f"schedule.start={self.start} lies after schedule.end={self.end}")

    def progress(self, x: float) -> float:
        raise NotImplementedError

    def window(self, total: int) -> Window:
        """Resolve start and end for a run of ``total`` steps (DESIGN 6).

        Raises:
            UserError: the window does not fit in the run.
        """
        start = to_steps(self.start, total, key="schedule.start")
        end = max(1, to_steps(self.end, total, key="schedule.end"))
        if start > end:
            raise UserError(f"schedule.start={self.start} is step {start}, after schedule.end={self.end}, step {end}")

        def exact(value: Steps, steps: int) -> float:
            return value * total if isinstance(value, float) and value <= 1 else float(steps)

        return Window(start, end, total, exact(self.start, start), exact(self.end, end))

    def share(self, x: float, first: int, last: int) -> float:
        """The share of the way from ``first`` to ``last`` that is covered at x."""
        return self.progress(x)

    def between(self, first: int, last: int, x: float) -> int:
        """The count at x: ``last + round((first − last) · g(x))``, exact at both ends (METHODS 11.1)."""
        return last + round((first - last) * (1.0 - self.share(x, first, last)))

    def count(self, step: int, window: Window, first: int, last: int) -> int:
        """K(t): ``first`` until the start step, ``last`` from the end step on (DESIGN 6)."""
        if step >= window.end:
            return last
        return first if step <= window.start else self.between(first, last, window.x(step))


@dataclass
class CubicLate(Schedule):
    """DoRA: slow, then fast; g = 1 − x³."""

    def progress(self, x: float) -> float:
        return x**3


@dataclass
class CubicEarly(Schedule):
    """AdaLoRA and AFLoRA: fast, then slow; g = (1 − x)³."""

    def progress(self, x: float) -> float:
        return 1.0 - (1.0 - x) ** 3


@dataclass
class Linear(Schedule):
    """g = 1 − x."""

    def progress(self, x: float) -> float:
        return x


@dataclass
class Power(Schedule):
    """g = 1 − x^p (late) or (1 − x)^p (early); p = 3 gives the two cubics."""

    exponent: float = field(default=2.0, metadata={"help": "p of x^p", "above": 0.0})
    late: bool = field(default=True, metadata={"help": "slow first (1 − x^p) or fast first ((1 − x)^p)"})

    def progress(self, x: float) -> float:
        return x**self.exponent if self.late else 1.0 - (1.0 - x) ** self.exponent


@dataclass
class Cosine(Schedule):
    """g = (1 + cos πx)/2: flat at both ends."""

    def progress(self, x: float) -> float:
        return (1.0 - math.cos(math.pi * x)) / 2


@dataclass
class Exponential(Schedule):
    """g = (e^{−kx} − e^{−k})/(1 − e^{−k}); k → 0 is linear, k < 0 is late."""

    rate: float = field(default=5.0, metadata={"help": "k of e^{−kx}", "low": -500.0, "high": 500.0})

    def progress(self, x: float) -> float:
        return x if abs(self.rate) < 1e-9 else math.expm1(-self.rate * x) / math.expm1(-self.rate)


@dataclass
class Geometric(Schedule):
    """b = b₀ (b_T/b₀)^x: the same share goes at every event."""

    def share(self, x: float, first: int, last: int) -> float:
        ratio = max(last, 1) / max(first, 1)
        return x if ratio == 1 or x in (0.0, 1.0) else (1.0 - ratio**x) / (1.0 - ratio)


@dataclass
class Sigmoid(Schedule):
    """g = (σ(k(½ − x)) − σ(−k/2)) / (σ(k/2) − σ(−k/2)): rescaled so that both ends are exact."""

    steepness: float = field(default=10.0, metadata={"help": "k of σ(k(½ − x))", "above": 0.0, "high": 500.0})

    def progress(self, x: float) -> float:
        def sigmoid(z: float) -> float:
            return 1.0 / (1.0 + math.exp(-z))

        low, high = sigmoid(-self.steepness / 2), sigmoid(self.steepness / 2)
        return 1.0 - (sigmoid(self.steepness * (0.5 - x)) - low) / (high - low)


@dataclass
class Step(Schedule):
    """Piecewise constant: ``points`` maps positions in the window to the share of the way covered from there on."""

    points: list[list[float]] = field(
        default_factory=lambda: [[0.25, 0.25], [0.5, 0.5], [0.75, 0.75]],
        metadata={"help": "pairs [x, share covered], both in 0 to 1 and rising; the end covers the rest"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = all(len(p) == 2 and all(isinstance(v, int | float) and 0 <= v <= 1 for v in p) for p in self.points)
        rising = numbers and all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.points))
        if not rising:
            raise UserError(
                f"schedule.points={self.points} must be pairs [x, share], each from 0 to 1, rising in both",
                hint="for example schedule.points=[[0.3,0.5],[0.7,0.9]]",
            )

    def progress(self, x: float) -> float:
        return 1.0 if x >= 1.0 else max((share for at, share in self.points if x >= at), default=0.0)


@dataclass
class OneShot(Schedule):
    """Everything until the end, then the final budget at once."""

    start: ClassVar[Steps] = 0  # type: ignore[misc]  # no key: nothing happens before the end
    one_event: ClassVar[bool] = True

    def progress(self, x: float) -> float:
        return 1.0 if x >= 1.0 else 0.0


@dataclass
class Constant(Schedule):
    """The same count throughout: static methods, and moves at a fixed total between start and end."""

    end: Steps = field(default=1.0, metadata={"help": "last allocation event: share of the run, or step", "low": 0})

    moves: ClassVar[bool] = False

    def progress(self, x: float) -> float:
        return 0.0

    def count(self, step: int, window: Window, first: int, last: int) -> int:
        return first


@dataclass
class Auto(Schedule):
    """No budget: cut, recover, and keep the cut if a held-out loss stays within a tolerance of its best (METHODS 11.2).

    Unlike there, cuts that are kept grow, as steps of a line search do: a short run has few events. And a search that
    failed ``patience`` times in a row is not over: it waits until the loss has fallen by the tolerance once more.
    """

    start: Steps = field(default=0.3, metadata={"help": "first cut: share of the run, or step", "low": 0})
    end: Steps = field(default=0.8, metadata={"help": "final choice: share of the run, or step", "low": 0})
    tolerance: float = field(
        default=0.02, metadata={"help": "share by which the held-out loss may exceed its best", "low": 0.0}
    )
    cut: float = field(
        default=0.1, metadata={"help": "share of what lives that the first cut takes", "above": 0.0, "high": 0.5}
    )
    growth: float = field(
        default=1.5,
        metadata={"help": "factor of the next cut's share after one that was kept, up to a quarter", "low": 1.0},
    )
    patience: int = field(
        default=4, metadata={"help": "cuts put back in a row before it waits for a lower loss", "low": 1}
    )
    floor: int = field(default=1, metadata={"help": "components that are left at least, in all", "low": 1})
    rows: int = field(default=256, metadata={"help": "validation rows whose loss decides, drawn once", "low": 1})
    events: int = field(
        default=24,
        metadata={"help": "events at most: in a long window they lie further apart than allocator.interval", "low": 2},
    )

    finds_budget: ClassVar[bool] = True
    own: ClassVar[frozenset[str]] = frozenset(
        {"start", "end"}
    )  # a loss that still falls by itself hides what is missed

    def progress(self, x: float) -> float:
        raise NotImplementedError("nobody knows it beforehand")

    def count(self, step: int, window: Window, first: int, last: int) -> int:
        """What nothing exceeds."""
        return first

    def spacing(self, interval: int, window: Window) -> int:
        """Steps that a cut has to recover: ``interval``, or more where ``events`` would not do."""
        return max(interval, math.ceil((window.end - window.start) / (self.events - 1)))

    def size(self, cut: float, alive: int, floor: int) -> int:
        """Units that a cut of a share takes: one at least, and none of the last ``floor``."""
        return max(0, min(max(1, math.ceil(round(cut * alive, 9))), alive - floor))

    def grown(self, cut: float) -> float:
        """The share of the cut after one that was kept."""
        return max(cut, min(cut * self.growth, MOST_CUT))

    def fastest(self, first: int, floor: int, events: int) -> list[int]:
        """What lives after each event if every cut is kept; the last event only decides."""
        alive, cut, counts = first, self.cut, list[int]()
        for _ in range(events - 1):
            alive, cut = alive - self.size(cut, alive, floor), self.grown(cut)
            counts.append(alive)
        return [*counts, alive]
