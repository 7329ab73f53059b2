"""Figures of a study: PSNR by setting, paired differences, and PSNR along a numeric axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from pipeline.report.figure import ACCENT, MUTED, WARNING, Picture, figure, figure_text, to_picture
from pipeline.study.results import NOISE_FLOOR, Row, StudyResults

_LONGEST_NAME = 48
_LOGARITHMIC_FROM = 50
"""Ratio of an axis' ends from which it is drawn in powers of ten."""


@dataclass(frozen=True)
class AxisFigure:
    """PSNR along one axis."""

    axis: str
    picture: Picture


def fidelity(results: StudyResults, rows: Sequence[Row]) -> Picture | None:
    """PSNR of every setting, and its paired difference to the reference where there is one; None without any value."""
    measured = [row for row in rows if row.setting is not None and row.psnr_db is not None]
    if not measured:
        return None
    reference = results.study.written.reference
    paired = any(row.difference is not None for row in measured)
    with figure(11, 1.3 + 0.34 * len(measured)) as drawn:
        panels = drawn.subplots(1, 2 if paired else 1, squeeze=False, sharey=True)[0]
        for index, row in enumerate(measured):
            _psnr(panels[0], index, row)
            if paired:
                _difference(panels[1], index, row)
        _noise_floor(panels[0], rows, vertical=True)
        panels[0].set_xlabel("PSNR, dB")
        panels[0].set_yticks(range(len(measured)), [figure_text(row.name, _LONGEST_NAME) for row in measured])
        panels[0].set_ylim(len(measured) - 0.4, -0.6)
        if paired:
            panels[1].axvline(0, color=MUTED, lw=0.9)
            panels[1].set_xlabel(f"difference to {figure_text(reference or '', _LONGEST_NAME)}, dB")
        for axes in panels:
            axes.grid(axis="x")
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        return to_picture(drawn, f"PSNR of {len(measured)} settings")


def along_axes(results: StudyResults, rows: Sequence[Row]) -> list[AxisFigure]:
    """One figure for every setting of the file that has exactly one axis, of at least two numbers."""
    figures = []
    for group, written in enumerate(results.study.written.settings):
        if len(written.axes) != 1:
            continue
        [(axis, values)] = written.axes.items()
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        own = {
            float(row.setting.axes[axis]): row
            for row in rows
            if numeric and row.setting is not None and row.setting.group == group and row.psnr_db is not None
        }
        if len(own) > 1:
            figures.append(AxisFigure(axis, _line(results, rows, axis, own)))
    return figures


def _line(results: StudyResults, rows: Sequence[Row], axis: str, own: Mapping[float, Row]) -> Picture:
    with figure(8, 3.6) as drawn:
        axes = drawn.subplots()
        places = sorted(own)
        means = np.array([own[x].psnr_db for x in places], dtype=float)
        spreads = np.array([own[x].psnr_db_sd or 0.0 for x in places])
        axes.fill_between(places, means - spreads, means + spreads, color=ACCENT, alpha=0.15, lw=0)
        axes.plot(places, means, "-D", color=ACCENT, ms=5)
        for x in places:
            seeds = list(own[x].seed_means.values())
            axes.plot([x] * len(seeds), seeds, "o", color=MUTED, ms=3.5, mew=0)
        for row in rows:
            if row.name == results.study.written.reference and row.psnr_db is not None:
                axes.axhline(row.psnr_db, color=MUTED, lw=1, ls=(0, (4, 3)))
                _label(axes, figure_text(row.name, _LONGEST_NAME), row.psnr_db)
        _noise_floor(axes, rows, vertical=False)
        if places[0] > 0 and places[-1] / places[0] >= _LOGARITHMIC_FROM:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_xlabel(figure_text(axis, 80))
        axes.set_ylabel("PSNR, dB")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        return to_picture(drawn, f"PSNR at {len(places)} values of {axis}")


def _psnr(axes: Axes, index: int, row: Row) -> None:
    seeds = list(row.seed_means.values())
    axes.plot(seeds, [index] * len(seeds), "o", color=MUTED, ms=4, mew=0, zorder=2)
    axes.errorbar(row.psnr_db or 0.0, index, xerr=row.psnr_db_sd, fmt="D", color=ACCENT, ms=5, capsize=3, zorder=3)


def _difference(axes: Axes, index: int, row: Row) -> None:
    if row.difference is not None:
        axes.errorbar(
            row.difference.mean, index, xerr=row.difference.half_width, fmt="D", color=ACCENT, ms=5, capsize=3
        )


def _noise_floor(axes: Axes, rows: Sequence[Row], *, vertical: bool) -> None:
    for row in rows:
        if row.name != NOISE_FLOOR or row.setting is not None or row.psnr_db is None:
            continue
        if vertical:
            axes.axvline(row.psnr_db, color=WARNING, lw=1, ls=(0, (4, 3)), label="noise floor")
            axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
        else:
            axes.axhline(row.psnr_db, color=WARNING, lw=1, ls=(0, (4, 3)))
            _label(axes, "noise floor", row.psnr_db)


def _label(axes: Axes, text: str, height: float) -> None:
    axes.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom", color=MUTED
    )
