"""Look of all figures, and their way into the page: SVG in a data URI, the same bytes for the same data."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

ACCENT = "#2a6f97"
MUTED = "#8a939b"
WARNING = "#b45309"
MAP = mpl.colormaps["viridis"]
MAX_VECTOR_CELLS = 150
"""Larger maps are drawn as pictures inside the SVG."""

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#5c666e",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": "#2d3439",
    "text.color": "#2d3439",
    "xtick.color": "#5c666e",
    "ytick.color": "#5c666e",
    "grid.color": "#e3e7ea",
    "grid.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "reelquant",
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Picture:
    """An image for the page."""

    uri: str
    """`data:` URI."""
    alt: str
    width: int
    """CSS pixels at which it is meant to be seen."""
    pixelated: bool = False
    """Whether to enlarge it without smoothing."""
    legend: tuple[tuple[str, str], ...] = ()
    """Labels in it and the names that they stand for, which the page spells out."""


@contextmanager
def figure(width_in: float, height_in: float) -> Iterator[Figure]:
    """A figure in the report's look; what is drawn must be drawn inside the block."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width_in, height_in), layout="constrained")


def to_picture(drawn: Figure, alt: str, legend: Sequence[tuple[str, str]] = ()) -> Picture:
    """Must be called inside the `figure` block."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=200)
    uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(uri, alt, round(drawn.get_figwidth() * 100), legend=tuple(legend))


def heat_map(
    axes: Axes, values: NDArray[np.float64], *, low: float, high: float, colour_map: Colormap = MAP, label: str = ""
) -> None:
    """`[rows, columns]`, first row on top; NaN stays white. With a colour bar if `label` is given."""
    cells = axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=colour_map,
        vmin=low,
        vmax=high if high > low else low + 1,
        edgecolors="white",
        linewidth=0.4 if max(values.shape) <= 80 else 0,
        rasterized=values.size > MAX_VECTOR_CELLS,
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if label and axes.figure is not None:
        bar = axes.figure.colorbar(cells, ax=axes, pad=0.01, aspect=18, fraction=0.04)
        bar.outline.set_visible(False)
        bar.set_label(label)
        bar.ax.tick_params(length=2)


def ticks(num: int, most: int) -> list[int]:
    """At most about `most` of `range(num)`, at a round distance, the first one included."""
    steps = (step * scale for scale in (1, 10, 100, 1000, 10_000) for step in (1, 2, 5))
    step = next((step for step in steps if num / step <= most), max(1, num))
    return list(range(0, num, step))


def figure_text(text: str, limit: int) -> str:
    """`text` for a figure: one line, at most `limit` characters, no mathematics between dollars.

    Empty if the font lacks any of it, or it is written from right to left, which the figures do not shape: such a text belongs
    into the page, whose fonts are the reader's.
    """
    line = " ".join(text.split())
    if any(ord(c) not in _characters() or unicodedata.bidirectional(c) in ("R", "AL") for c in line):
        return ""
    short = line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
    return short.replace("$", r"\$")


def figure_labels(names: Sequence[str], limit: int) -> tuple[list[str], list[tuple[str, str]]]:
    """A label for every name, and a legend of those that a figure cannot show whole; these are numbered, from 1."""
    labels = [figure_text(name, limit) for name in names]
    shown = [len(" ".join(name.split())) <= limit and bool(label) for name, label in zip(names, labels, strict=True)]
    numbered = [label if whole else f"({i})" for i, (label, whole) in enumerate(zip(labels, shown, strict=True), 1)]
    return numbered, [(numbered[i], name) for i, name in enumerate(names) if not shown[i]]


@cache
def _characters() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
