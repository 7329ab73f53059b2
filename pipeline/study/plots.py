"""Figures of a study: velocity SQNR by setting, paired differences, and along a numeric axis; without it, mean PSNR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from pipeline.report.figure import ACCENT, MUTED, WARNING, Picture, figure, figure_labels, figure_text, to_picture
from pipeline.study.intervals import Interval
from pipeline.study.results import StudyResults
from pipeline.study.rows import NOISE_FLOOR, Row, Score

_LONGEST_NAME = 48
_LOGARITHMIC_FROM = 50
"""Ratio of an axis' ends from which it is drawn in powers of ten."""


@dataclass(frozen=True)
class AxisFigure:
    """Quality along one axis."""

    axis: str
    picture: Picture


@dataclass(frozen=True)
class _Quality:
    """The number that the figures show, of every row that has it."""

    label: str
    scores: Mapping[str, Score]
    """By name of the setting."""
    noise_floor: Score | None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Quality:
        """The velocity's SQNR, or where no setting has it the mean PSNR."""
        for label, score in (("velocity SQNR, dB", _velocity), ("mean PSNR, dB", _psnr)):
            scores = {row.name: found for row in rows if row.setting is not None and (found := score(row)) is not None}
            floors = (score(row) for row in rows if row.setting is None and row.name == NOISE_FLOOR)
            if scores:
                return cls(label, scores, next(floors, None))
        return cls("", {}, None)


def _velocity(row: Row) -> Score | None:
    return row.velocity


def _psnr(row: Row) -> Score | None:
    return row.psnr


def fidelity(results: StudyResults, rows: Sequence[Row]) -> Picture | None:
    """Quality of every setting, and its paired difference to the reference where there is one; None without any value."""
    quality = _Quality.of(rows)
    measured = list(quality.scores.items())
    if not measured:
        return None
    labels, legend = figure_labels([name for name, _ in measured], _LONGEST_NAME)
    reference = _reference_text(results)
    paired = any(score.difference is not None for _, score in measured)
    with figure(11, 1.3 + 0.34 * len(measured)) as drawn:
        panels = drawn.subplots(1, 2 if paired else 1, squeeze=False, sharey=True)[0]
        for index, (_, score) in enumerate(measured):
            seeds = list(score.seed_means.values())
            panels[0].plot(seeds, [index] * len(seeds), "o", color=MUTED, ms=4, mew=0, zorder=2)
            _interval(panels[0], index, score.mean)
            if score.difference is not None:
                _interval(panels[1], index, score.difference)
        if quality.noise_floor is not None:
            floor = quality.noise_floor.mean.mean
            panels[0].axvline(floor, color=WARNING, lw=1, ls=(0, (4, 3)), label="noise floor")
            panels[0].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
        panels[0].set_xlabel(quality.label)
        panels[0].set_yticks(range(len(measured)), labels)
        panels[0].set_ylim(len(measured) - 0.4, -0.6)
        if paired:
            panels[1].axvline(0, color=MUTED, lw=0.9)
            panels[1].set_xlabel(f"difference to {reference}, dB")
        for axes in panels:
            axes.grid(axis="x")
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        return to_picture(drawn, f"{quality.label.removesuffix(', dB')} of {len(measured)} settings", legend)


def along_axes(results: StudyResults, rows: Sequence[Row]) -> list[AxisFigure]:
    """One figure for every setting of the file that has exactly one axis, of at least two numbers."""
    figures, quality = [], _Quality.of(rows)
    for group, written in enumerate(results.study.written.settings):
        if len(written.axes) != 1:
            continue
        [(axis, values)] = written.axes.items()
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        own = {
            float(row.setting.axes[axis]): quality.scores[row.name]
            for row in rows
            if numeric and row.setting is not None and row.setting.group == group and row.name in quality.scores
        }
        if len(own) > 1:
            figures.append(AxisFigure(axis, _line(results, quality, axis, own)))
    return figures


def _reference_text(results: StudyResults) -> str:
    return figure_text(results.study.written.reference or "", _LONGEST_NAME) or "the reference"


def _line(results: StudyResults, quality: _Quality, axis: str, own: Mapping[float, Score]) -> Picture:
    reference = results.study.written.reference
    with figure(8, 3.6) as drawn:
        axes = drawn.subplots()
        places = sorted(own)
        means = np.array([own[x].mean.mean for x in places])
        spreads = np.array([own[x].mean.half_width or 0.0 for x in places])
        axes.fill_between(places, means - spreads, means + spreads, color=ACCENT, alpha=0.15, lw=0)
        axes.plot(places, means, "-D", color=ACCENT, ms=5)
        for x in places:
            seeds = list(own[x].seed_means.values())
            axes.plot([x] * len(seeds), seeds, "o", color=MUTED, ms=3.5, mew=0)
        if reference is not None and reference in quality.scores:
            _level(axes, _reference_text(results), quality.scores[reference], color=MUTED)
        if quality.noise_floor is not None:
            _level(axes, "noise floor", quality.noise_floor, color=WARNING)
        if places[0] > 0 and places[-1] / places[0] >= _LOGARITHMIC_FROM:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_xlabel(figure_text(axis, 80))
        axes.set_ylabel(quality.label)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        return to_picture(drawn, f"{quality.label.removesuffix(', dB')} at {len(places)} values of {axis}")


def _interval(axes: Axes, index: int, found: Interval) -> None:
    axes.errorbar(found.mean, index, xerr=found.half_width, fmt="D", color=ACCENT, ms=5, capsize=3, zorder=3)


def _level(axes: Axes, text: str, score: Score, *, color: str) -> None:
    axes.axhline(score.mean.mean, color=color, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        text,
        (1, score.mean.mean),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        ha="right",
        va="bottom",
        color=MUTED,
    )
