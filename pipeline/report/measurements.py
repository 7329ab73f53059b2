"""The evaluation's numbers, by model and prompt, and the table that the report prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.loading import parse_config
from pipeline.report.grid import Cell
from pipeline.report.quantities import (
    NOTHING,
    Spread,
    bytes_text,
    decibels_text,
    estimate_text,
    fraction_text,
    interval_text,
    seconds_text,
    share_text,
    spread,
    spread_text,
)
from pipeline.report.run_data import RunData
from pipeline.run_units import FULL_PRECISION, NOISE_FLOOR, evaluation_name, prompt_names
from pipeline.study.estimators import Estimate, hodges_lehmann, valley, wilson_interval
from pipeline.study.intervals import mean_interval
from pipeline.study.quality_scores import THIRDS, Recorded, recorded
from reelquant.calibration.block_rounding import EXACT_DB


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
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """In dB, from errors on the full-precision trajectories (`pipeline.study.quality_scores`)."""

    def values(self, metric: str) -> dict[str, float]:
        """One metric of all prompts that have it."""
        sources = (self.results, self.scores)
        return {prompt: float(r[metric]) for of in sources for prompt, r in of.items() if r.get(metric) is not None}

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


def measure(run: RunData) -> tuple[ModelMeasurements, ...]:
    """Full precision first, then the methods in the run's order and the settings of the first one's checkpoint; models without
    any result and checkpoint too."""
    errors = _recorded(run)
    return tuple(_measured(run, name, errors) for name in (FULL_PRECISION, *run.method_names, *run.setting_names))


def measure_noise_floor(run: RunData) -> ModelMeasurements | None:
    """Full precision against itself under another attention backend; None where it is not measured."""
    found = _measured(run, NOISE_FLOOR, _recorded(run))
    return found if found.results or found.scores else None


def _recorded(run: RunData) -> Recorded:
    units = {record.unit: record.result for record in run.stages["evaluation"].records}
    return recorded(parse_config({**run.config, "run": str(run.location)}, f"{run.location}/config.json"), units.get)


def _measured(run: RunData, name: str, errors: Recorded) -> ModelMeasurements:
    prompts = prompt_names(run.config["prompts"]["num_held_out"])
    records = {prompt: run.record("evaluation", evaluation_name(name, prompt)) for prompt in prompts}
    num_bytes, compression = _size(run, name)
    results = {prompt: record.result for prompt, record in records.items() if record is not None}
    return ModelMeasurements(name, results, num_bytes, compression, errors.scores(name))


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    name: str
    unit: str
    """With an arrow for the direction that is better."""
    value: Callable[[ModelMeasurements], float | None]
    text: Callable[[ModelMeasurements], str]
    sign: int
    """1 if more is better, -1 if less is, 0 where no best is named: the reference operations' speed says nothing of the fast
    kernels'."""


@dataclass(frozen=True)
class Table:
    """What the report prints: only columns under which a row has something to say."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, list[Cell]], ...]
    fork_db: float | None
    """A video of lower PSNR counts as a fork; None where nothing parts them."""

    def has(self, name: str) -> bool:
        """Whether there is a column of that name."""
        return any(column.name == name for column in self.columns)


def table(
    models: tuple[ModelMeasurements, ...],
    noise_floor: ModelMeasurements | None = None,
    *,
    fork_db: float | None = None,
) -> Table:
    """One row a model, the best quantized value of a column marked where there are several methods; the noise floor last.

    Args:
        models: full precision first.
        fork_db: as configured; None finds it in the PSNRs of all methods.
    """
    methods = models[1:]
    if fork_db is None:
        fork_db = valley([value for model in methods for value in model.values("psnr_db").values()])
    everything = (*models, *([] if noise_floor is None else [noise_floor]))
    columns = [*_COLUMNS[:3], *_compared_columns(methods[0] if len(methods) > 1 else None, fork_db), *_COLUMNS[3:]]
    columns = [column for column in columns if any(column.value(model) is not None for model in everything)]
    best = []
    for column in columns:
        ranked = [column.sign * value for model in methods if (value := column.value(model)) is not None]
        best.append(max(ranked) if column.sign and len(set(ranked)) > 1 else None)
    rows = []
    for model in everything:
        cells = []
        for column, limit in zip(columns, best, strict=True):
            value = column.value(model)
            is_best = model in methods and value is not None and limit is not None and column.sign * value >= limit
            cells.append(Cell(column.text(model), is_best))
        rows.append((model.name, cells))
    return Table(tuple(columns), tuple(rows), fork_db)


def _compared_columns(reference: ModelMeasurements | None, fork_db: float | None) -> list[Column]:
    """Share of forks, and where there are several methods the typical difference of the PSNR to the first one's."""

    def forks(model: ModelMeasurements) -> Estimate | None:
        psnr = model.values("psnr_db").values()
        return None if fork_db is None else wilson_interval(sum(value < fork_db for value in psnr), len(psnr))

    def forks_value(model: ModelMeasurements) -> float | None:
        found = forks(model)
        return None if found is None else found.value

    columns = [Column("Forks", "videos, ↓", forks_value, lambda model: share_text(forks(model)), -1)]
    if reference is None:
        return columns
    base = reference.values("psnr_db")

    def typical(model: ModelMeasurements) -> Estimate | None:
        own = {} if model.name in (reference.name, NOISE_FLOOR) else model.values("psnr_db")
        return hodges_lehmann([value - base[prompt] for prompt, value in own.items() if prompt in base])

    def typical_value(model: ModelMeasurements) -> float | None:
        found = typical(model)
        return None if found is None else found.value

    unit = f"to {reference.name}, dB, ↑"
    return [*columns, Column("PSNR", unit, typical_value, lambda model: estimate_text(typical(model)), 0)]


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


def _interval_text(metric: str) -> Callable[[ModelMeasurements], str]:
    return lambda model: interval_text(mean_interval(list(model.values(metric).values())))


def _thirds_text(model: ModelMeasurements) -> str:
    found = [model.spread(f"velocity_sqnr_db_{part}") for part in THIRDS]
    if all(value is None for value in found):
        return NOTHING
    return " / ".join(NOTHING if value is None else f"{value.mean:.1f}" for value in found)


_COLUMNS = (
    Column("Velocity SQNR", "dB, ↑", _mean("velocity_sqnr_db"), _interval_text("velocity_sqnr_db"), 1),
    Column("By thirds", "early / middle / late, dB, ↑", _mean(f"velocity_sqnr_db_{THIRDS[0]}"), _thirds_text, 0),
    Column("Early commit", "dB, ↑", _mean("early_commit_db"), _interval_text("early_commit_db"), 1),
    Column("Worst prompt", "PSNR, dB, ↑", _worst, _worst_text, 1),
    Column("SSIM", "0–1, ↑", _mean("ssim"), lambda m: spread_text(m.spread("ssim"), 4), 1),
    Column("LPIPS", "↓", _mean("lpips"), lambda m: spread_text(m.spread("lpips"), 3), -1),
    Column(
        "Recognized",
        "prompts, ↑",
        _recognition_rate,
        lambda m: NOTHING if m.recognized is None else fraction_text(*m.recognized),
        1,
    ),
    Column("Transformer", "bytes, ↓", lambda m: m.transformer_bytes, lambda m: bytes_text(m.transformer_bytes), -1),
    Column(
        "Compression",
        "× of 16 bits, ↑",
        lambda m: m.compression,
        lambda m: NOTHING if m.compression is None else f"{m.compression:.2f}",
        1,
    ),
    Column("Per step", "median", lambda m: m.seconds_per_step, lambda m: seconds_text(m.seconds_per_step), 0),
    Column("Mean PSNR", "dB, ↑", _mean("psnr_db"), lambda m: decibels_text(m.spread("psnr_db")), 1),
)
"""Those that stand of themselves; forks and differences come after the first three."""
