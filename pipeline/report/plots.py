"""Figures of the calibration: salience maps, block losses, layer errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.report.calibration import (
    CalibratedBlock,
    RepairedBlock,
    Salience,
    layer_kinds,
    short_name,
    sqnr_map,
)
from pipeline.report.figure import ACCENT, MAP, MUTED, Picture, figure, figure_text, heat_map, ticks, to_picture
from reelquant.calibration.block_rounding import EXACT_DB

EXACT_COLOUR = "#d5dade"
SCORE_NAMES = {
    "diffusion": "diffusion salience",
    "latent": "latent (spectral norm of XᵀX)",
    "block_input": "block input (spectral norm, mean of blocks)",
    "weight_error": "weight error (relative, real rounding)",
}
MARKERS = "osD^v"
MAX_RANKED_STEPS = 60
"""Up to this many columns a mark has room for its rank."""
MAX_VALUED_CELLS = 300
"""Up to this many cells of the SQNR map show their number."""


def salience_map(salience: Salience) -> Picture:
    """The product scores of all candidates, the chosen ones marked."""
    num_prompts, num_steps = salience.product.shape
    with figure(11, max(2.0, 0.9 + 0.3 * num_prompts)) as drawn:
        axes = drawn.subplots()
        heat_map(axes, salience.product, low=0, high=float(salience.product.max()), label="product of two scores")
        limit = 34 if num_prompts <= 40 else 0
        labels = [
            f"{figure_text(prompt, limit)}  {i}" if limit else f"{i}" for i, prompt in enumerate(salience.prompts)
        ]
        shown = ticks(num_prompts, 40)
        axes.set_yticks([i + 0.5 for i in shown], [labels[i].strip() for i in shown])
        _step_axis(axes, num_steps, 26)
        axes.set_ylabel("prompt" if limit == 0 else "")
        _mark(axes, salience, ranked=num_steps <= MAX_RANKED_STEPS and num_prompts <= 40)
        alt = f"Salience of {num_prompts} prompts at {num_steps} steps, {len(salience.chosen)} chosen samples marked"
        return to_picture(drawn, alt)


def salience_parts(salience: Salience) -> Picture:
    """The scores that the product is made of, or could be made of, side by side."""
    num_prompts, num_steps = salience.product.shape
    rows = (len(salience.maps) + 1) // 2
    with figure(11, rows * max(1.3, 0.7 + min(2.4, 0.12 * num_prompts))) as drawn:
        grid = drawn.subplots(rows, 2, squeeze=False).flatten()
        # Not strict: an odd number of maps leaves one panel empty.
        for axes, (name, scores) in zip(grid, salience.maps.items(), strict=False):
            heat_map(axes, scores, low=0, high=1)
            used = "  · used" if name in ("diffusion", salience.feature) else ""
            constant = "  · constant" if name in salience.constant else ""
            axes.set_title(SCORE_NAMES.get(name, name) + used + constant, color=ACCENT if used else MUTED)
            shown = ticks(num_prompts, 6)
            axes.set_yticks([i + 0.5 for i in shown], [str(i) for i in shown])
            _step_axis(axes, num_steps, 12)
            axes.set_ylabel("prompt")
        for axes in grid[len(salience.maps) :]:
            axes.set_visible(False)
        return to_picture(drawn, f"Single scores: {', '.join(salience.maps)}")


def losses(blocks: Sequence[CalibratedBlock], method: str) -> Picture | None:
    """Loss over epochs of every block, and before and after the whole calibration; None if nothing was measured."""
    if not any(block.loss_after is not None for block in blocks):
        return None
    learned = any(block.losses for block in blocks)
    with figure(11, 3.6) as drawn:
        panels = drawn.subplots(1, 2 if learned else 1, squeeze=False)[0]
        if learned:
            _loss_curves(panels[0], blocks)
        _before_after(panels[-1], blocks, narrow=learned)
        for axes in panels:
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        return to_picture(drawn, f"Loss of {len(blocks)} blocks, method {method}")


def sqnr_limits(blocks: Mapping[str, Sequence[CalibratedBlock]]) -> tuple[float, float]:
    """Smallest and largest SQNR in dB of all layers with an error, over all methods."""
    values = [value for found in blocks.values() for block in found for value in block.layer_sqnr_db.values()]
    lossy = [value for value in values if value < EXACT_DB]
    return (min(lossy), max(lossy)) if lossy else (0.0, EXACT_DB)


def sqnr(blocks: Sequence[CalibratedBlock], method: str, limits: tuple[float, float]) -> Picture | None:
    """Signal to quantization noise of every layer, as a map of layer kind and block; None if none was measured.

    Args:
        limits: ends of the colour scale in dB, the same for all methods.
    """
    measured = tuple(blocks)
    kinds = layer_kinds(measured)
    if not kinds:
        return None
    values = sqnr_map(measured, kinds)
    lossy = np.where(values >= EXACT_DB, np.nan, values)
    with figure(11, 1.0 + 0.22 * len(kinds)) as drawn:
        axes = drawn.subplots()
        low, high = limits
        heat_map(axes, lossy, low=low, high=high, label="SQNR, dB")
        _exact_cells(axes, values)
        if values.size <= MAX_VALUED_CELLS and len(measured) <= 24:
            _cell_numbers(axes, values, low=low, high=high)
        axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
        _block_axis(axes, measured, offset=0.5)
        return to_picture(drawn, f"SQNR of {int(np.isfinite(values).sum())} layers, method {method}")


def sqnr_by_block(blocks: Mapping[str, Sequence[CalibratedBlock]]) -> Picture | None:
    """Median over a block's layers, one line a method; None for fewer than two methods with values."""
    found = {method: tuple(b) for method, b in blocks.items() if any(block.layer_sqnr_db for block in b)}
    if len(found) < 2:
        return None
    with figure(11, 2.6) as drawn:
        axes = drawn.subplots()
        for index, (method, measured) in enumerate(found.items()):
            medians = [
                float(np.median(list(block.layer_sqnr_db.values()))) if block.layer_sqnr_db else np.nan
                for block in measured
            ]
            colour = ACCENT if index == 0 else MAP(0.5 + 0.38 * index / (len(found) - 1))
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(medians, marker=marker, color=colour, lw=2 if index == 0 else 1.2, ms=4, label=method)
        axes.set_ylabel("median SQNR, dB")
        axes.grid(axis="y")
        axes.legend(frameon=False, ncols=len(found), loc="upper right")
        _block_axis(axes, next(iter(found.values())))
        return to_picture(drawn, f"Median SQNR by block: {', '.join(found)}")


def drift(blocks: Sequence[RepairedBlock], method: str) -> Picture | None:
    """Error of the stream after every block, without and with the repair; None if nothing was repaired."""
    if not blocks:
        return None
    with figure(11, 2.8) as drawn:
        axes = drawn.subplots()
        position = np.arange(len(blocks))
        without, after = _column([b.without for b in blocks]), _column([b.after for b in blocks])
        axes.plot(position, without, "o-", mfc="white", mec=MUTED, color=MUTED, lw=1.2, ms=4, label="without repair")
        axes.plot(position, after, "o-", color=ACCENT, lw=1.6, ms=4, label="repaired")
        _log_axis(axes, [*without, *after])
        _block_axis(axes, blocks)
        axes.set_ylabel("relative squared error of the stream")
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=8)
        return to_picture(drawn, f"Drift after {len(blocks)} blocks, method {method}")


def _step_axis(axes: Axes, num_steps: int, most: int) -> None:
    shown = ticks(num_steps, most)
    axes.set_xticks([i + 0.5 for i in shown], [str(i) for i in shown])
    axes.set_xlabel("denoising step (0: most noise)")


def _mark(axes: Axes, salience: Salience, *, ranked: bool) -> None:
    x = [step + 0.5 for _, step in salience.chosen]
    y = [prompt + 0.5 for prompt, _ in salience.chosen]
    size = 90 if ranked else 24
    axes.scatter(x, y, s=size, facecolor="white", edgecolor="black", linewidth=0.7, zorder=3)
    if not ranked or salience.strategy != "salience":
        return
    for rank, (prompt, step) in enumerate(salience.chosen, 1):
        axes.text(step + 0.5, prompt + 0.52, str(rank), ha="center", va="center", fontsize=6, zorder=4)


def _loss_curves(axes: Axes, blocks: Sequence[CalibratedBlock]) -> None:
    scale = Normalize(0, max(1, len(blocks) - 1))
    for index, block in enumerate(blocks):
        if not block.losses:
            continue
        start = () if block.loss_before is None else (block.loss_before,)
        curve = (*start, *block.losses)
        first = 0 if start else 1
        marker = "o" if len(curve) <= 8 else ""
        axes.plot(range(first, first + len(curve)), curve, marker=marker, ms=3, lw=1.2, color=MAP(scale(index)))
    _log_axis(axes, [loss for block in blocks for loss in (*block.losses, block.loss_before)])
    axes.set_xlabel("epoch (0: before learning)")
    axes.set_ylabel("loss (mean squared error, weighted)")
    axes.set_title("while learning")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.figure is not None:
        bar = axes.figure.colorbar(ScalarMappable(scale, MAP), ax=axes, pad=0.01, aspect=22)
        bar.outline.set_visible(False)
        bar.set_label("block, in model order")


def _before_after(axes: Axes, blocks: Sequence[CalibratedBlock], *, narrow: bool) -> None:
    position = np.arange(len(blocks))
    before = _column([block.loss_before for block in blocks])
    after = _column([block.loss_after for block in blocks])
    axes.vlines(position, np.fmin(before, after), np.fmax(before, after), color="#c5ccd2", lw=1.2)
    axes.plot(position, before, "o", mfc="white", mec=MUTED, ms=4, label="before (start values)")
    axes.plot(position, after, "o", color=ACCENT, ms=4, label="after rounding")
    _log_axis(axes, [*before, *after])
    _block_axis(axes, blocks, most=15 if narrow else 30)
    axes.set_title("before learning and after rounding")
    axes.set_ylabel("loss (mean squared error, weighted)")
    axes.legend(frameon=False, fontsize=8)


def _log_axis(axes: Axes, values: Sequence[float | None]) -> None:
    found = [value for value in values if value is not None and np.isfinite(value)]
    if found and min(found) > 0:
        axes.set_yscale("log")
    elif found and max(found) == 0:
        axes.set_ylim(0, 1)
        axes.set_yticks([0])
        axes.text(0.5, 0.5, "every loss is exactly 0", transform=axes.transAxes, ha="center", color=MUTED)


def _block_axis(
    axes: Axes, blocks: Sequence[CalibratedBlock | RepairedBlock], *, offset: float = 0, most: int = 30
) -> None:
    shown = ticks(len(blocks), most)
    axes.set_xticks([i + offset for i in shown], [short_name(blocks[i].name) for i in shown])
    kinds = {"S": "S: single-stream", "2": "2/: of the second transformer"}
    first = {name[0] for block in blocks if not (name := short_name(block.name)).isdigit()}
    explained = ", ".join(text for kind, text in kinds.items() if kind in first)
    axes.set_xlabel(f"block ({explained})" if explained else "block")


def _exact_cells(axes: Axes, values: NDArray[np.float64]) -> None:
    exact = np.where(values >= EXACT_DB, 0.0, np.nan)
    if np.isnan(exact).all():
        return
    axes.pcolormesh(np.ma.masked_invalid(exact), cmap=ListedColormap([EXACT_COLOUR]), edgecolors="white", linewidth=0.4)
    handle = Patch(facecolor=EXACT_COLOUR, label=f"no error measured (≥ {EXACT_DB:.0f} dB)")
    axes.legend(handles=[handle], frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.0))


def _cell_numbers(axes: Axes, values: NDArray[np.float64], *, low: float, high: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        dark = value < EXACT_DB and (value - low) / max(high - low, 1e-9) < 0.6
        text = f"{value:.0f}" if value >= EXACT_DB else f"{value:.1f}"
        axes.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "#2d3439"
        )


def _column(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
