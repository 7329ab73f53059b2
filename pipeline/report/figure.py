"""Look of all figures, and their way into the page: SVG in a data URI, the same bytes for the same data."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
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


@contextmanager
def figure(width_in: float, height_in: float) -> Iterator[Figure]:
    """A figure in the report's look; what is drawn must be drawn inside the block."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width_in, height_in), layout="constrained")


def to_picture(drawn: Figure, alt: str) -> Picture:
    """Must be called inside the `figure` block."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=200)
    uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(uri, alt, round(drawn.get_figwidth() * 100))


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
    """`text` for a figure: one line, at most `limit` characters, only what the font has, no mathematics between dollars.

    Empty if the font lacks too much of it.
    """
    line = " ".join(text.split())
    known = "".join(character if ord(character) in _characters() else "\N{WHITE SQUARE}" for character in line)
    if known.count("\N{WHITE SQUARE}") > len(known) // 4:
        return ""
    short = known if len(known) <= limit else known[: limit - 1].rstrip() + "…"
    return short.replace("$", r"\$")


@cache
def _characters() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
