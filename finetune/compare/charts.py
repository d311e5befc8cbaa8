"""A comparison's charts, as SVG that takes its text's colour from the page around it, light or dark."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#4477aa", "#e0673c", "#2a9d5c", "#c2a11d", "#3fa7c9", "#b0489b", "#7d7d7d", "#8a6d3b", "#6b6bd6", "#d1495b")
"""Told apart on white and on black, and by most who see colours differently (after Paul Tol's schemes)."""
_STYLES, _MARKS = ("-", "--", "-.", ":"), "os^Dv<>P*X"
_INK = "#010203"  # stands for the page's text colour until the end
_LOOK = {
    "svg.fonttype": "none", "text.parse_math": False,  # names are shown as they are, dollars and all
    "font.size": 10, "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": _INK, "grid.alpha": 0.12, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One entrant's learning curve.

    Attributes:
        x: (L,) what it had cost.
        mean, low, high: (L,); the ends NaN where there is no interval.
        place: of the entrant, for its colour; the same in every chart.
    """

    name: str
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    place: int


@dataclass(frozen=True)
class Bar:
    """One entrant's gain; `low` and `high` None where there is no interval."""

    name: str
    value: float
    low: float | None
    high: float | None
    place: int


def curves_chart(curves: Sequence[Curve], x_label: str, y_label: str, alt: str) -> str:
    """Lines with bands. `alt` is what a screen reader says of it."""
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes: Axes = figure.subplots()
        axes.axhline(0, color=_INK, linewidth=0.8, alpha=0.5)
        lines = []
        for curve in curves:
            colour = COLOURS[curve.place % len(COLOURS)]
            style, mark = _STYLES[curve.place // len(COLOURS) % len(_STYLES)], _MARKS[curve.place % len(_MARKS)]
            lines += axes.plot(curve.x, curve.mean, style, marker=mark, markersize=4, color=colour)
            if np.isfinite(curve.low).all():
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_xlim(left=0)
        # Not by the lines' labels: of those, what begins with an underscore is left out.
        figure.legend(lines, [curve.name for curve in curves], loc="outside lower center", ncols=2)
        return _svg(figure, alt)


def gains_chart(bars: Sequence[Bar], x_label: str, alt: str) -> str:
    """Gains with their intervals, one under the other, in the order given."""
    with matplotlib.rc_context(_LOOK | {"axes.grid": False}):
        figure = Figure(figsize=(5.4, 0.9 + 0.34 * len(bars)), layout="constrained")
        axes: Axes = figure.subplots()
        axes.axvline(0, color=_INK, linewidth=0.8, alpha=0.5)
        for row, bar in enumerate(bars):
            colour = COLOURS[bar.place % len(COLOURS)]
            if bar.low is not None:
                axes.plot([bar.low, bar.high], [row, row], color=colour, linewidth=3, alpha=0.5, solid_capstyle="round")
            axes.plot(bar.value, row, _MARKS[bar.place % len(_MARKS)], color=colour, markersize=7)
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(x_label)
        return _svg(figure, alt)


def _svg(figure: Figure, alt: str) -> str:
    """As it stands in a page: no prologue, no size of its own, no ids shared with another chart."""
    salt = re.sub(r"\W+", "-", alt)
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # Names such as figure_1 and text_1 are matplotlib's own, the same in every chart; nothing refers to them.
    text = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
