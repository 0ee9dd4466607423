"""What a comparison draws: quality against parameters, and curves over each other. A colour is a method, a line style
a budget, the same in every chart.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dora_cli.reporting.charts import INK, MUTED, SERIES, SURFACE, Chart, log_scale, plain_numbers
from dora_cli.reporting.compare import Group, Setting, mean_of
from dora_cli.reporting.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))  # on, off, … in line widths; () solid
MARKERS = ("o", "s", "^", "D")
MOST_LABELS = 14  # at the ends of curves
MOST_POINTS = 8  # that have a label on a phone
# Where a point's label may stand: offset in CSS pixels and alignment, the best first.
SPOTS = (
    *((8, 9, "left"), (8, -9, "left"), (-8, 9, "right"), (-8, -9, "right")),
    *((10, 0, "left"), (-10, 0, "right"), (0, 13, "center"), (0, -13, "center")),
)
LONGEST_LABEL = 28  # characters, inside a chart
LETTER, LINE, LEADER = 5.6, 13, 20  # CSS pixels: a letter of size 10 (about), a line of labels, what leads to one


class Looks:
    """Colour, marker and line style of each group: methods and budgets in the order in which they come."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._methods = list(dict.fromkeys(group.method for group in groups))
        of_method: dict[str, list[str]] = {}
        for group in groups:
            of_method.setdefault(group.method, []).append(group.label)
        budgets = list(dict.fromkeys(group.budget for group in groups))
        self.by_budget = all(len({g.budget for g in groups if g.method == m}) == len(of_method[m]) for m in of_method)
        # Where a method has several groups at one budget, its groups are told apart instead.
        self._style = {
            g.label: budgets.index(g.budget) if self.by_budget else of_method[g.method].index(g.label) for g in groups
        }

    def colour(self, group: Group) -> str:
        return SERIES[self._methods.index(group.method) % len(SERIES)]

    def series(self, group: Group) -> int:
        """The number of the colour in the style sheet, from 1."""
        return self._methods.index(group.method) % len(SERIES) + 1

    def marker(self, group: Group) -> str:
        return MARKERS[self._methods.index(group.method) // len(SERIES) % len(MARKERS)]

    def dashes(self, group: Group) -> tuple[float, ...]:
        return DASHES[self._style[group.label] % len(DASHES)]


def charts(setting: Setting) -> dict[str, Chart]:
    """File name without ending → chart, of what there is to draw."""
    looks = Looks(setting.groups)
    found = {
        "quality": Chart(
            f"{setting.metric} against parameters at the end, mean ± sd over seeds",
            f"{setting.metric} of each group against its parameters",
            lambda axes, narrow: _draw_quality(axes, setting, looks, narrow),
            height=340,
        )
    }
    for name in dict.fromkeys((setting.metric, "loss")):
        if any(_points(run, name) for group in setting.groups for run in group.runs):
            found[f"curve-{name}"] = Chart(
                f"{name} on {_split(setting)}: thin each seed, thick their mean",
                f"{name} of every run over the steps",
                lambda axes, narrow, name=name: _draw_curves(axes, setting, looks, name, narrow),  # type: ignore[misc]
                height=300,
            )
    return found


# ---- quality against parameters ------------------------------------------------------------------------------------
def _draw_quality(axes: "Axes", setting: Setting, looks: Looks, narrow: bool) -> None:
    sized = [g for g in setting.measured if g.params is not None and g.params.mean > 0]
    for group in setting.measured:
        assert group.metric is not None
        if group not in sized:  # a head alone: there is no place for it on a logarithmic axis
            axes.axhline(group.metric.mean, color=looks.colour(group), linestyle=(0, (2, 3)), linewidth=1.2)
            axes.annotate(
                f"{group.label}: no adapter",
                (0, group.metric.mean),
                xycoords=("axes fraction", "data"),
                xytext=(2, 3),
                textcoords="offset points",
                fontsize=9,
                color=MUTED,
            )
    if not sized:
        return
    at = {g.label: (g.params.mean, g.metric.mean) for g in sized if g.params is not None and g.metric is not None}
    front = [g for g in setting.front if g in sized]
    if front:  # a head alone may be better than all of them
        x, y = zip(*(at[g.label] for g in front), strict=True)
        axes.plot(x, y, color=MUTED, linewidth=6, alpha=0.25, drawstyle="steps-post", zorder=1, label="Pareto front")
    for group in sized:
        assert group.metric is not None
        of_method = [g for g in sized if g.method == group.method]
        if looks.by_budget and group is of_method[0]:  # what a budget costs
            mx, my = zip(*sorted(at[g.label] for g in of_method), strict=True)
            axes.plot(mx, my, color=looks.colour(group), linewidth=1, alpha=0.5, zorder=2)
        axes.errorbar(
            *at[group.label],
            yerr=group.metric.sd,
            color=looks.colour(group),
            marker=looks.marker(group),
            markersize=8,
            markeredgecolor=SURFACE,
            elinewidth=1.4,
            capsize=3,
            zorder=3,
        )
    axes.margins(x=0.12, y=0.14)
    log_scale(axes, "x", most=4 if narrow else 6)
    axes.set_xlabel("adapter parameters at the end")
    axes.set_ylabel(setting.metric)
    if front:
        axes.legend(loc="best", fontsize=9)
    if narrow and len(sized) > MOST_POINTS:
        return
    _label_points(axes, [(at[g.label], _cut(g.label)) for g in sized], narrow)


def _label_points(axes: "Axes", points: list[tuple[tuple[float, float], str]], narrow: bool) -> None:
    """Each point's label where it covers least."""
    # Drawing units are CSS pixels: 72 a figure's inch.
    spots = [tuple(axes.transData.transform(point)) for point, _ in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    frame = axes.bbox
    size = 9 if narrow else 10
    scale = 72 / axes.figure.dpi
    for (x, y), (point, text) in zip(spots, points, strict=True):
        width, height = len(text) * LETTER * size / 10 / scale, (size + 2) / scale
        best, least = None, float("inf")
        for dx, dy, ha in SPOTS:
            left = x + dx / scale - {"left": 0, "right": width, "center": width / 2}[ha]
            box = (left, y + dy / scale - height / 2, left + width, y + dy / scale + height / 2)
            outside = max(0, frame.x0 - box[0]) + max(0, box[2] - frame.x1)
            cost = sum(_overlap(box, other) for other in taken) + 50 * outside
            if cost < least:
                best, least = (dx, dy, ha, box), cost
        assert best is not None
        dx, dy, ha, box = best
        taken.append(box)
        axes.annotate(
            text, point, xytext=(dx, dy), textcoords="offset points", ha=ha, va="center", fontsize=size, color=INK
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


# ---- curves --------------------------------------------------------------------------------------------------------
def _draw_curves(axes: "Axes", setting: Setting, looks: Looks, name: str, narrow: bool) -> None:
    last = max(run.steps for group in setting.groups for run in group.runs)
    ends = []
    for group in setting.groups:
        dashes = looks.dashes(group)
        look: Any = {"color": looks.colour(group), "linestyle": (0, dashes) if dashes else "solid"}
        for run in group.runs:
            steps, values = run.curve(run.splits[0], name) if run.splits else ([], [])
            axes.plot(steps, values, linewidth=0.8, alpha=0.35, **look)
        curve = mean_curve(group.finished, name)
        if curve:
            dot = "o" if len(curve) == 1 else None
            axes.plot(list(curve), list(curve.values()), linewidth=2.2, marker=dot, **look)
            ends.append((list(curve)[-1], list(curve.values())[-1], group))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(name)
    plain_numbers(axes, "x")
    axes.margins(y=0.06)
    if narrow or not ends or len(ends) > MOST_LABELS:  # the page names them above
        axes.set_xlim(0, 1.02 * max(last, 1))
    else:
        _label_ends(axes, ends, max(last, 1), looks)


def _label_ends(axes: "Axes", ends: list[tuple[int, float, Group]], last: int, looks: Looks) -> None:
    """Each mean's label to the right of all curves, at its end's height or near it."""
    labels = [_cut(group.label) for _, _, group in ends]
    width, height = (side * 72 / axes.figure.dpi for side in (axes.bbox.width, axes.bbox.height))
    axes.set_xlim(0, last * width / (width - LETTER * max(map(len, labels)) - LEADER))
    low, high = axes.get_ylim()
    wanted = [(value - low) / (high - low) * height - LINE / 2 for _, value, _ in ends]
    places = spread(wanted, LINE, height - LINE)
    for (step, value, group), label, place in zip(ends, labels, places, strict=True):
        end = low + (place + LINE / 2) / height * (high - low)
        right = axes.get_xlim()[1] / width  # steps a pixel
        axes.plot(
            [step, last + 4 * right, last + (LEADER - 4) * right],
            [value, value, end],
            color=looks.colour(group),
            linewidth=0.8,
            alpha=0.6,
        )
        axes.annotate(label, (last + LEADER * right, end), va="center", fontsize=10, color=INK)


def _cut(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def mean_curve(runs: Sequence[Run], name: str) -> dict[int, float]:
    """Step → mean over runs, of the steps at which all of them were evaluated."""
    curves = [dict(_points(run, name)) for run in runs]
    shared = [step for step in curves[0] if all(step in curve for curve in curves)] if curves else []
    means = {step: mean_of([curve[step] for curve in curves]) for step in shared}
    return {step: mean.mean for step, mean in means.items() if mean is not None}


def spread(wanted: Sequence[float], gap: float, room: float) -> list[float]:
    """Places as near as may be to those wanted, in their order, ``gap`` apart, between 0 and ``room``.

    Where there is no room for that gap they share what there is.
    """
    gap = min(gap, room / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Neighbours that are pushed against each other move as one block, whose centre stays where theirs was.
    blocks: list[tuple[float, int]] = []  # (place of the first, how many)
    for i in order:
        blocks.append((min(max(wanted[i], 0), room), 1))
        while len(blocks) > 1 and blocks[-2][0] + blocks[-2][1] * gap > blocks[-1][0]:
            (start, n), (other, m) = blocks[-2:]
            centre = (n * (start + (n - 1) * gap / 2) + m * (other + (m - 1) * gap / 2)) / (n + m)
            first = centre - (n + m - 1) * gap / 2
            blocks[-2:] = [(min(max(first, 0), room - (n + m - 1) * gap), n + m)]
    places = [start + k * gap for start, n in blocks for k in range(n)]
    found = [0.0] * len(wanted)
    for i, place in zip(order, places, strict=True):
        found[i] = place
    return found


def _points(run: Run, name: str) -> list[tuple[int, float]]:
    return list(zip(*run.curve(run.splits[0], name), strict=True)) if run.splits else []


def _split(setting: Setting) -> str:
    return next((run.splits[0] for group in setting.groups for run in group.runs if run.splits), "validation")
