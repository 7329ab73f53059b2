"""The roofline of an H100: what kernels reach, over their arithmetic intensity, below the card's measured ceilings.

Intensity is operations over the bytes that must be read and written once, both counted from shapes, as in
`benchmarks.dit_step.kernel_table`. For kernels that memory bounds, the counted operations of a value are a convention, which
places a point along the slope but not its distance from it: norm 8, rotation by blocks of 128 as a product 256, quantization
4; RMS norm 4 and rotary embedding 3; unpacking and scaling a weight 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.ceilings import BF16, COPY, FP8
from benchmarks.dit_step.kernel_table import profiles
from benchmarks.kernels.bench import FULL
from benchmarks.kernels.int8_linear import shapes
from benchmarks.kernels.tables import attention_rows

INPUT_OPS, ROTATION_OPS, QK_OPS, EXPANSION_OPS = 12.0, 256.0, 7.0, 3.0
STYLES = {
    "attention": ("tab:blue", "sparse attention"),
    "products": ("tab:red", "INT8 products"),
    "torch": ("tab:gray", "torch: products, dense attention"),
    "memory": ("tab:green", "bound by memory"),
}
LABELS = {
    "dense cudnn": ("dense, cuDNN", 7, 3),
    "dense fa2": ("dense, FlashAttention 2", 0, -13),
    "band triton 15 %": ("band 15 %", -4, 7),
    "band triton 25 %": ("band 25 %", 0, -14),
    "band, then corrected 15 %": ("15 %, corrected apart", -26, -14),
    "refresh, one pass 15 %": ("dense and band", 7, -4),
    "8-bit attention, sparse step, ours 25 %, 8-bit attention": ("8 bits, 15 and 25 %", 7, -4),
    "linear, double out, default": ("INT8, ours", -52, -3),
    "linear, double out, fp8 _scaled_mm": ("FP8", -23, -3),
    "linear, double out, bf16 torch.mm": ("bf16", -27, -3),
    "linear, double out, _int_mm": ("torch INT8", -20, -14),
    "input, 3072, norm, rotation 128, default": ("input quantization, rotation", 8, -4),
    "input, 3072, norm, default": ("input quantization, no rotation", 8, -4),
    "expansion, 4 bits 3072x3072, default": ("weight expansion, QK norm and RoPE", 6, -14),
}
"""By point: its label, and how many points right of and above it that stands."""


@dataclass(frozen=True)
class Point:
    """One kernel."""

    name: str
    kind: str
    """A key of `STYLES`."""
    intensity: float
    """Operations a byte."""
    rate: float
    """Operations a second."""
    in_step: bool = False
    """Measured within a denoising step, not alone."""


def attention_points(document: Mapping[str, Any]) -> Iterator[Point]:
    """The fastest variant of each case; bytes are those of q, k, v and the result."""
    num_bytes = 8.0 * FULL.joint * FULL.width
    best: dict[str, tuple[float, float]] = {}
    for row in attention_rows(document):
        if row["case"].startswith("sums"):
            continue
        name = row["case"] if row.get("density") is None else f"{row['case']} {100 * row['density']:.0f} %"
        flop = row["tflops"] * row["ms"] * 1e9
        best[name] = max(best.get(name, (0.0, 0.0)), (row["tflops"] * 1e12, flop / num_bytes))
    for name, (rate, intensity) in best.items():
        yield Point(name, "torch" if name.startswith("dense") else "attention", intensity, rate)


OF_TORCH = ("bf16 torch.mm", "_int_mm", "fp8 _scaled_mm")
"""Variants of a product that are torch's."""


def linear_points(document: Mapping[str, Any]) -> Iterator[Point]:
    """Products over all tokens, and what memory bounds."""
    for row in document["rows"]:
        name = f"{row['group']}, {row['case']}, {row['variant']}"
        if "ms" not in row or row["group"] not in ("linear", "input", "qk", "expansion"):
            continue
        if row["group"] == "linear":
            ours = row["variant"] == "default"
            if not ours and row["variant"] not in OF_TORCH:
                continue  # another tile of ours
            intensity = _product_intensity(row["case"], in_bytes=2 if "bf16" in row["variant"] else 1, epilogue=ours)
            yield Point(name, "products" if ours else "torch", intensity, row["tops"] * 1e12)
        elif row["variant"] == "default":
            intensity = _memory_intensity(row["group"], row["case"])
            yield Point(name, "memory", intensity, row["gb_s"] * 1e9 * intensity)


def _product_intensity(case: str, *, in_bytes: int, epilogue: bool) -> float:
    num_tokens, d, launches = shapes(FULL)[case]
    n = sum(outputs for outputs, _ in launches)
    residual = 2 * num_tokens * n if epilogue and launches[0][1] == "residual" else 0
    return 2.0 * num_tokens * d * n / (in_bytes * (num_tokens + n) * d + 2 * num_tokens * n + residual)


def _memory_intensity(group: str, case: str) -> float:
    if group == "qk":
        return QK_OPS / 4
    if group == "expansion":
        return EXPANSION_OPS / (1 + int(case.split()[0]) / 8)
    return (INPUT_OPS + (ROTATION_OPS if "rotation" in case else 0.0)) / 3


def step_points(document: Mapping[str, Any]) -> Iterator[Point]:
    """The classes of our profiled steps."""
    intensities = {
        "input quantization": (INPUT_OPS + ROTATION_OPS) / 3,
        "QK norm and RoPE": QK_OPS / 4,
        "weight expansion": EXPANSION_OPS / (1 + document["settings"]["weight_bits"] / 8),
    }
    kinds = {
        "INT8 products": "products",
        "dense attention": "torch",
        "band attention": "attention",
        "8-bit attention": "attention",
    }
    width = 3072
    blocks = document["settings"]["double"] + document["settings"]["single"]
    for (case, step), rows in profiles(document).items():
        for row in rows:
            if not case.startswith("ours") or row.work is None or row.rate is None:
                continue
            name = f"{row.name}, {step}, {case}"
            rate = row.work.amount / row.ms * 1e3
            if row.name in intensities:
                intensity = intensities[row.name]
                yield Point(name, "memory", intensity, rate * intensity, in_step=True)
            elif row.name.endswith("attention"):
                intensity = row.work.amount / (8.0 * FULL.joint * width * blocks)
                yield Point(name, kinds[row.name], intensity, rate, in_step=True)
            else:
                yield Point(
                    name,
                    kinds[row.name],
                    _product_intensity("double qkv", in_bytes=1, epilogue=True),
                    rate,
                    in_step=True,
                )


def draw(points: list[Point], path: Path) -> None:
    """Writes the plot; as SVG, the same bytes for the same points."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Axes = figure.subplots()
    _draw_roofs(axes)
    for kind, (color, label) in STYLES.items():
        for in_step in (False, True):
            chosen = [point for point in points if point.kind == kind and point.in_step == in_step]
            axes.scatter(
                [point.intensity for point in chosen],
                [point.rate / 1e12 for point in chosen],
                s=60 if in_step else 30,
                marker="D" if in_step else "o",
                facecolors="none" if in_step else color,
                edgecolors=color,
                label=None if in_step else label,
                zorder=3,
            )
    axes.scatter([], [], s=60, marker="D", facecolors="none", edgecolors="black", label="within a denoising step")
    for point in points:
        if point.name in LABELS:
            text, right, above = LABELS[point.name]
            at = (point.intensity, point.rate / 1e12)
            color = STYLES[point.kind][0]
            axes.annotate(text, at, (right, above), textcoords="offset points", fontsize=7.5, color=color)
    axes.set(xscale="log", yscale="log", xlim=(1, 2e5), ylim=(2, 2500))
    axes.set_xlabel("arithmetic intensity, operations a byte")
    axes.set_ylabel("achieved, 10¹² operations a second")
    axes.grid(True, which="major", linewidth=0.4, color="0.85")
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _draw_roofs(axes: Axes) -> None:
    intensity = np.geomspace(1, 2e5, 400)
    for ceiling, style, name in ((BF16, "-", "bf16"), (FP8, "--", "FP8, the same for INT8")):
        roof = np.minimum(intensity * COPY.per_second, ceiling.per_second) / 1e12
        axes.plot(intensity, roof, style, color="black", linewidth=1.2)
        axes.text(1.8e5, ceiling.rate * 1.05, f"{name}: {ceiling.rate:.0f}", ha="right", va="bottom", fontsize=8)
    axes.text(16, 16 * COPY.rate / 1e3 * 1.25, f"copy: {COPY.rate:.0f} GB/s", rotation=43, fontsize=8, ha="center")
