"""The evaluation's numbers, by model and prompt, and the table that the report prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.quantities import (
    NOTHING,
    Spread,
    bytes_text,
    decibels_text,
    fraction_text,
    seconds_text,
    spread,
    spread_text,
)
from pipeline.report.run_data import RunData
from pipeline.run_units import FULL_PRECISION
from reelquant.calibration.block_rounding import EXACT_DB
from workers.perceptual import PerceptualDistance


@dataclass(frozen=True)
class ModelMeasurements:
    """One model on the held-out prompts; mappings are by prompt name (`prompt-003`) and hold what was measured."""

    name: str
    """`full_precision` or a method's name."""
    results: Mapping[str, Mapping[str, Any]]
    """What the evaluation workers returned."""
    transformer_bytes: int | None
    compression: float | None
    """16-bit bytes of the transformer over its own."""

    def values(self, metric: str) -> dict[str, float]:
        """One metric of all prompts that have it."""
        return {prompt: float(r[metric]) for prompt, r in self.results.items() if r.get(metric) is not None}

    def spread(self, metric: str) -> Spread | None:
        """Over prompts."""
        return spread(self.values(metric).values())

    @property
    def seconds_per_step(self) -> float | None:
        """Median over prompts of the medians over steps."""
        found = sorted(self.values("seconds_per_step").values())
        return found[len(found) // 2] if found else None

    @property
    def worst_prompt(self) -> str | None:
        """Name of the prompt with the lowest PSNR."""
        found = self.values("psnr_db")
        return min(found, key=lambda prompt: found[prompt]) if found else None

    @property
    def recognized(self) -> tuple[int, int] | None:
        """Prompts whose digits were read, of how many."""
        found = self.values("recognized")
        return (int(sum(found.values())), len(found)) if found else None


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    best: bool = False


def measure(run: RunData) -> tuple[ModelMeasurements, ...]:
    """Full precision first, then the methods in the run's order; models without any result and checkpoint too."""
    num_prompts = run.config["prompts"]["num_held_out"]
    found = []
    for name in (FULL_PRECISION, *run.method_names):
        units = {f"prompt-{index:03d}": f"{name}-prompt-{index:03d}" for index in range(num_prompts)}
        records = {prompt: run.record("evaluation", unit) for prompt, unit in units.items()}
        num_bytes, compression = _size(run, name)
        results = {prompt: record.result for prompt, record in records.items() if record is not None}
        found.append(ModelMeasurements(name, results, num_bytes, compression))
    return tuple(found)


def missing_lpips(models: tuple[ModelMeasurements, ...]) -> str | None:
    """Why there is no LPIPS, or None if any prompt has it."""
    if any(model.values("lpips") for model in models):
        return None
    available = PerceptualDistance.available()
    if isinstance(available, str):
        return available
    return "LPIPS was not available where the evaluation ran; it is now, so evaluating again measures it"


COLUMNS: tuple[tuple[str, str], ...] = (
    ("PSNR", "dB, ↑"),
    ("Worst prompt", "PSNR, dB, ↑"),
    ("SSIM", "0–1, ↑"),
    ("LPIPS", "↓"),
    ("Recognized", "prompts, ↑"),
    ("Transformer", "bytes, ↓"),
    ("Compression", "× of 16 bits, ↑"),
    ("Per step", "median"),
)
"""Name, and unit with the direction that is better."""


def table(models: tuple[ModelMeasurements, ...]) -> list[tuple[str, list[Cell]]]:
    """Rows of `COLUMNS`, the best quantized value of a column marked where there are several methods."""
    columns = [_COLUMN_VALUES[name] for name, _ in COLUMNS]
    best = []
    for key, _, sign in columns:
        ranked = [sign * value for model in models[1:] if (value := key(model)) is not None]
        best.append(max(ranked) if sign and len(set(ranked)) > 1 else None)
    rows = []
    for index, model in enumerate(models):
        cells = []
        for (key, text, sign), limit in zip(columns, best, strict=True):
            value = key(model)
            is_best = index > 0 and value is not None and limit is not None and sign * value >= limit
            cells.append(Cell(text(model), is_best))
        rows.append((model.name, cells))
    return rows


def all_identical(models: tuple[ModelMeasurements, ...]) -> bool:
    """Whether every quantized video equals its full-precision one: no quantized layer reaches the output then."""
    found = [value for model in models for value in model.values("psnr_db").values()]
    return bool(found) and min(found) >= EXACT_DB


def relative_speed(models: tuple[ModelMeasurements, ...], name: str) -> float | None:
    """Seconds per step of a method over those of the full-precision model."""
    seconds = {model.name: model.seconds_per_step for model in models}
    reference, own = seconds[FULL_PRECISION], seconds[name]
    return own / reference if own is not None and reference else None


def _size(run: RunData, name: str) -> tuple[int | None, float | None]:
    assembled = [run.record("assembly", method) for method in run.method_names]
    if name == FULL_PRECISION:
        sizes = [record.result.get("source_bytes") for record in assembled if record is not None]
        return (sizes[0], 1.0) if sizes and sizes[0] is not None else (None, None)
    record = run.record("assembly", name)
    return (None, None) if record is None else (record.result["transformer_bytes"], record.result["compression"])


def _mean(metric: str) -> Callable[[ModelMeasurements], float | None]:
    def mean(model: ModelMeasurements) -> float | None:
        found = model.spread(metric)
        return None if found is None else found.mean

    return mean


def _worst(model: ModelMeasurements) -> float | None:
    return min(model.values("psnr_db").values(), default=None)


def _worst_text(model: ModelMeasurements) -> str:
    value = _worst(model)
    return NOTHING if value is None else f"{value:.2f} ({model.worst_prompt})"


def _recognition_rate(model: ModelMeasurements) -> float | None:
    return None if model.recognized is None else model.recognized[0] / model.recognized[1]


_COLUMN_VALUES: dict[
    str, tuple[Callable[[ModelMeasurements], float | None], Callable[[ModelMeasurements], str], int]
] = {
    "PSNR": (_mean("psnr_db"), lambda m: decibels_text(m.spread("psnr_db")), 1),
    "Worst prompt": (_worst, _worst_text, 1),
    "SSIM": (_mean("ssim"), lambda m: spread_text(m.spread("ssim"), 3), 1),
    "LPIPS": (_mean("lpips"), lambda m: spread_text(m.spread("lpips"), 3), -1),
    "Recognized": (
        _recognition_rate,
        lambda m: NOTHING if m.recognized is None else fraction_text(*m.recognized),
        1,
    ),
    "Transformer": (lambda m: m.transformer_bytes, lambda m: bytes_text(m.transformer_bytes), -1),
    "Compression": (
        lambda m: m.compression,
        lambda m: NOTHING if m.compression is None else f"{m.compression:.2f}",
        1,
    ),
    "Per step": (lambda m: m.seconds_per_step, lambda m: seconds_text(m.seconds_per_step), 0),
}
"""By column: the number, its text, and 1 if more is better, -1 if less is, 0 where no best is named: the reference
operations' speed says nothing of the fast kernels'."""
