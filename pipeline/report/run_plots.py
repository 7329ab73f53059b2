"""Figures of the run: when what ran, and the evaluation by method and prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from numpy.typing import NDArray

from pipeline.report.figure import ACCENT, MAP, MUTED, WARNING, Picture, figure, figure_labels, ticks, to_picture
from pipeline.report.measurements import ModelMeasurements
from pipeline.report.timeline import Bar, Timeline

MAX_VECTOR_BARS = 1500
LOST_COLOUR = "#c5ccd2"

Colour = tuple[float, float, float, float]


def timeline(read: Timeline, stages: Sequence[str]) -> Picture | None:
    """One band a stage, one lane a worker in it; None without any unit."""
    if not read.bars:
        return None
    unit, seconds_per_unit = _time_unit(read.total_s)
    with figure(11, 0.7 + 0.34 * len(stages)) as drawn:
        axes = drawn.subplots()
        for band, stage in enumerate(stages):
            colour = _stage_colour(stage, stages)
            bars = [bar for bar in read.bars if bar.stage == stage]
            _band(axes, bars, band, colour, total_s=read.total_s, scale=seconds_per_unit)
        for resumed in read.resumed_s:
            axes.axvline(resumed / seconds_per_unit, color=WARNING, lw=0.9, ls=(0, (4, 3)))
        axes.set_yticks(range(len(stages)), stages)
        axes.set_ylim(len(stages) - 0.45, -0.55)
        axes.set_xlim(0, read.total_s / seconds_per_unit)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(f"time with a driver at work, {unit}")
        outcomes = {bar.outcome for bar in read.bars}
        labels = {"lost": (LOST_COLOUR, "lost with its driver"), "failed": (WARNING, "failed attempt")}
        handles = [Patch(color=colour, label=label) for key, (colour, label) in labels.items() if key in outcomes]
        if handles:
            axes.legend(handles=handles, frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
        return to_picture(drawn, f"Timeline of {len(read.bars)} attempts at units")


def gantt(read: Timeline, stages: Sequence[str]) -> Picture | None:
    """One lane a worker, one bar a unit in the colour of its stage; None without any unit."""
    if not read.bars:
        return None
    unit, scale = _time_unit(read.total_s)
    workers = sorted({bar.worker for bar in read.bars}, key=_worker_order)
    present = [stage for stage in stages if any(bar.stage == stage for bar in read.bars)]
    with figure(11, 1.1 + min(8.0, 0.3 * len(workers))) as drawn:
        axes = drawn.subplots()
        for stage in present:
            own = [bar for bar in read.bars if bar.stage == stage]
            axes.barh(
                [workers.index(bar.worker) for bar in own],
                [max(bar.seconds, read.total_s / 800) / scale for bar in own],
                left=[bar.start_s / scale for bar in own],
                height=0.8,
                color=_stage_colour(stage, stages),
                edgecolor=["white" if bar.outcome == "finished" else WARNING for bar in own],
                hatch=["" if bar.outcome == "finished" else "////" for bar in own],
                linewidth=0.3,
                rasterized=len(read.bars) > MAX_VECTOR_BARS,
            )
        for resumed in read.resumed_s:
            axes.axvline(resumed / scale, color=WARNING, lw=0.9, ls=(0, (4, 3)))
        shown = ticks(len(workers), 40)
        axes.set_yticks(shown, [workers[i] for i in shown])
        axes.set_ylim(len(workers) - 0.4, -0.6)
        axes.set_xlim(0, read.total_s / scale)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"time with a driver at work, {unit}")
        handles = [Patch(color=_stage_colour(stage, stages), label=stage) for stage in present]
        if any(bar.outcome != "finished" for bar in read.bars):
            handles.append(Patch(facecolor="white", edgecolor=WARNING, hatch="////", label="failed or lost"))
        axes.legend(handles=handles, frameon=False, fontsize=8, ncols=8, loc="lower left", bbox_to_anchor=(0, 1))
        return to_picture(drawn, f"Gantt chart of {len(read.bars)} attempts at units on {len(workers)} workers")


def _worker_order(worker: str) -> list[int]:
    """`worker-2` before `worker-10`, and a replica's ranks after the worker of one process with its number."""
    return [int(part) for part in re.findall(r"\d+", worker)]


def _stage_colour(stage: str, stages: Sequence[str]) -> Colour:
    return MAP(0.08 + 0.75 * stages.index(stage) / max(1, len(stages) - 1))


def fidelity(models: Sequence[ModelMeasurements]) -> Picture | None:
    """PSNR and SSIM of every prompt by method, lines joining a prompt; None without any comparison."""
    compared = [model for model in models if model.values("psnr_db")]
    if not compared:
        return None
    labels, legend = figure_labels([model.name for model in compared], 18)
    with figure(11, 3.8) as drawn:
        for axes, (metric, label) in zip(
            drawn.subplots(1, 2), (("psnr_db", "PSNR, dB"), ("ssim", "SSIM")), strict=True
        ):
            _strip(axes, compared, metric)
            axes.set_xticks(range(len(compared)), labels)
            axes.set_ylabel(label)
        alt = f"PSNR and SSIM by prompt: {', '.join(model.name for model in compared)}"
        return to_picture(drawn, alt, legend)


def _band(axes: Axes, bars: Sequence[Bar], band: int, colour: Colour, *, total_s: float, scale: float) -> None:
    workers = sorted({bar.worker for bar in bars})
    height = 0.8 / max(1, len(workers))
    colours = {"finished": colour, "lost": LOST_COLOUR, "failed": WARNING}
    for lane, worker in enumerate(workers):
        own = [bar for bar in bars if bar.worker == worker]
        spans = [(bar.start_s / scale, max(bar.seconds, total_s / 800) / scale) for bar in own]
        axes.broken_barh(
            spans,
            (band - 0.4 + lane * height, height * (0.9 if len(workers) <= 16 else 1)),
            facecolors=[colours[bar.outcome] for bar in own],
            edgecolor="white",
            linewidth=0.3 if len(own) < 100 else 0,
            rasterized=len(own) * len(workers) > MAX_VECTOR_BARS,
        )


def _strip(axes: Axes, models: Sequence[ModelMeasurements], metric: str) -> None:
    columns = [model.values(metric) for model in models]
    shared = sorted({prompt for column in columns for prompt in column})
    for prompt in shared:
        line = [column.get(prompt, np.nan) for column in columns]
        axes.plot(range(len(line)), line, "-", color="#c9d1d7", lw=0.8, zorder=1)
    for index, column in enumerate(columns):
        values = np.array([column[prompt] for prompt in shared if prompt in column])
        spots = index + _sideways(len(values))
        axes.plot(spots, values, "o", ms=4, mfc=MUTED, mec="white", mew=0.4, zorder=2)
        sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        mean = float(values.mean())
        above = min(sd, 1 - mean) if metric == "ssim" else sd
        axes.errorbar(
            index + 0.25,
            mean,
            yerr=[[sd], [above]] if sd else None,
            fmt="D",
            ms=5,
            color=ACCENT,
            capsize=3,
            lw=1.2,
            zorder=3,
        )
    axes.set_xlim(-0.5, len(models) - 0.35)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _sideways(num: int) -> NDArray[np.float64]:
    """Small sideways shifts, the same for the same number of points, so that equal values stay visible."""
    shifts: NDArray[np.float64] = (np.arange(num, dtype=np.float64) * 0.618 % 1 - 0.5) * (0.16 if num > 1 else 0)
    return shifts


def _time_unit(total_s: float) -> tuple[str, float]:
    if total_s < 300:
        return "s", 1.0
    return ("min", 60.0) if total_s < 3 * 3600 else ("h", 3600.0)
