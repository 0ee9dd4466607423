"""Charts by matplotlib: as SVG inside a page, which takes its colours from the page and comes in two widths, or as PNG.

A chart is drawn with the colours of the light theme. In a page each of them becomes a variable of the style sheet
(``page.py``), so that the same drawing is right in the light, in the dark and on paper.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour of the light theme → variable of the style sheet.
INK, MUTED, GRID, SURFACE, SHADE = "#1a1a19", "#6b6a65", "#e4e3de", "#fcfcfb", "#f0efeb"
SERIES = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface", SHADE: "--shade"} | {
    colour: f"--s{i}" for i, colour in enumerate(SERIES, start=1)
}
WIDE, NARROW = 720, 360  # CSS pixels; the narrow one is for phones
STYLE: Any = {  # matplotlib's type lists every key that there is
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # names may hold a dollar sign
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """One drawing.

    ``draw(axes, narrow)`` draws it; ``says`` is read out in its place; ``height`` is in CSS pixels.
    """

    title: str
    says: str
    draw: Callable[["Axes", bool], None]
    height: int = 240

    def inline(self) -> Markup:
        """Both widths as SVG; the style sheet shows one of them."""
        both = "".join(self._svg(width, narrow) for width, narrow in ((WIDE, False), (NARROW, True)))
        return Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>').format(self.title, Markup(both))

    def png(self, scale: float = 2.0) -> bytes:
        """The wide one as a picture with a background, ``scale`` pixels a CSS pixel."""
        buffer = BytesIO()
        figure = self._figure(WIDE, False, titled=True)
        figure.savefig(buffer, format="png", dpi=72 * scale, facecolor=SURFACE, metadata={"Software": None})
        return buffer.getvalue()

    def _svg(self, width: int, narrow: bool) -> str:
        import matplotlib

        # Its own names for clip paths: one that stands in a hidden drawing must not be another's.
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{self.title} {width}"}):
            buffer = StringIO()
            self._figure(width, narrow).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _themed(buffer.getvalue(), "narrow" if narrow else "wide", self.says)

    def _figure(self, width: int, narrow: bool, titled: bool = False) -> "Figure":
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(width / 72, self.height / 72))
            top = 40 if titled else 18
            axes = figure.add_axes(  # fixed margins: to measure every text first doubles the time
                (60 / width, 42 / self.height, 1 - 70 / width, 1 - (42 + top) / self.height)
            )
            self.draw(axes, narrow)
            if titled:
                figure.suptitle(self.title, x=0.01, ha="left", fontsize=12)
        return figure


def write_png(chart: Chart, path: Path) -> None:
    """Write ``chart`` to ``path``; the file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_bytes(chart.png())
    partial.replace(path)


def shade_window(axes: "Axes", window: tuple[int, int] | None, text: str, *, closed: bool) -> None:
    """Shade the steps from the first allocation event to the last, and name them at the upper edge.

    ``closed``: the last one is the final choice, and gets a line.
    """
    if window is None:
        return
    axes.axvspan(*window, color=SHADE, linewidth=0, zorder=0)
    if closed:
        axes.axvline(window[1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (window[1], 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 1),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
        color=MUTED,
        annotation_clip=False,
    )


def plain_numbers(axes: "Axes", of: str = "y") -> None:
    """Thousands as 1,000 on an axis of counts."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.yaxis if of == "y" else axes.xaxis
    axis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_scale(axes: "Axes", of: str = "y", most: int = 6) -> None:
    """A logarithmic axis with ``most`` plain numbers or fewer; to be called when all is drawn, which decides them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    (axes.set_yscale if of == "y" else axes.set_xscale)("log")
    axis = axes.yaxis if of == "y" else axes.xaxis
    low, high = axes.get_ylim() if of == "y" else axes.get_xlim()
    steps = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=most) if high > 8 * low else MaxNLocator(most - 1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _themed(svg: str, kind: str, says: str) -> str:
    """The drawing alone, without XML's head and fixed size, its colours those of the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', body)
    assert box is not None
    head = f'<svg class="{kind}" {box[0]} role="img" aria-label="{escape(says)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    body = head + body[body.index(">") + 1 :]
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1; font-family: inherit", body)
    return re.sub(r"\n\s*", "\n", body)
