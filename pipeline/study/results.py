"""What a study measured: every video's values by setting, seed and prompt, and one row of means a setting.

`results.json` holds everything, `results.csv` the rows. A mean and its standard deviation are of the seeds' means; paired
differences are of the same prompt with the same seed.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.runner import provenance
from pipeline.study.block_errors import BlockErrors, difference_interval
from pipeline.study.expansion import Setting, Study
from pipeline.study.intervals import Interval, mean_interval

FORMAT_VERSION = 1
FULL_PRECISION = "full precision"
NOISE_FLOOR = "noise floor (bf16, other attention backend)"
WORST_FRAC = 0.05
_COLUMN_METRICS = ("psnr_db", "ssim", "recognized", "seconds_per_step")

Prompts = Mapping[str, Mapping[str, float]]
"""Everything numeric that the evaluation returned, by prompt name and metric."""


@dataclass(frozen=True)
class SeedResult:
    """One run."""

    run: str
    """Its directory in the study's."""
    failure: str | None
    prompts: Prompts = field(default_factory=dict)
    transformer_bytes: int | None = None
    compression: float | None = None
    distillation_seconds: float | None = None
    """Sum over its segments, whichever run did them; the workers' construction is in it."""
    block_errors: BlockErrors | None = None
    """None where the method measures none, because it reads no activations."""
    distilled_on: tuple[str, ...] = ()
    """Devices."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a setting, full precision, or the noise floor."""

    name: str
    setting: Setting | None
    seed_means: Mapping[int, float]
    """PSNR in dB by seed."""
    n: int
    """Videos compared."""
    psnr_db: float | None = None
    psnr_db_sd: float | None = None
    """Over the seeds' means; None for one seed."""
    difference: Interval | None = None
    """To the reference in dB, with its 95 % interval."""
    worst_db: float | None = None
    """Mean of the worst 5 % of all videos, of one at least."""
    means: Mapping[str, float] = field(default_factory=dict)
    """Of all other metrics, over all videos."""
    transformer_bytes: float | None = None
    compression: float | None = None
    distillation_seconds: float | None = None
    block_error_db: float | None = None
    """Mean over seeds and blocks."""
    block_error_difference: Interval | None = None
    """To the reference in dB, with its 95 % interval over the seeds."""
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyResults:
    """All that was measured."""

    study: Study
    settings: Mapping[str, Mapping[int, SeedResult]]
    """By name and seed."""
    full_precision: Mapping[int, Prompts]
    """By seed; empty if the settings do not share one."""
    noise_floor: Mapping[int, Prompts]
    devices: tuple[str, ...]
    """On which the videos were generated."""

    def rows(self) -> list[Row]:
        """The settings in the file's order, then full precision and noise floor where they were measured."""
        reference = self.study.written.reference
        against = self._values(reference) if reference is not None else {}
        blocks_against = self.block_errors(reference) if reference is not None else {}
        rows = []
        for setting in self.study.settings:
            seeds = self.settings[setting.name]
            failures = tuple(f"seed {seed}: {found.failure}" for seed, found in seeds.items() if found.failure)
            prompts = {seed: found.prompts for seed, found in seeds.items() if found.prompts}
            others = {} if setting.name == reference else against
            row = _row(setting.name, setting, prompts, others, sizes=list(seeds.values()), failures=failures)
            errors = self.block_errors(setting.name)
            apart = difference_interval(errors, blocks_against) if setting.name != reference else None
            mean_db = _mean(found.mean_db for found in errors.values())
            rows.append(replace(row, block_error_db=mean_db, block_error_difference=apart))
        for name, found in ((FULL_PRECISION, self.full_precision), (NOISE_FLOOR, self.noise_floor)):
            if found:
                rows.append(_row(name, None, found, {}))
        return rows

    def document(self) -> dict[str, Any]:
        """`results.json`."""
        settings = [
            {
                "name": setting.name,
                "slug": setting.slug,
                "overrides": dict(setting.overrides),
                "axes": dict(setting.axes),
                "seeds": {str(seed): asdict(found) for seed, found in self.settings[setting.name].items()},
            }
            for setting in self.study.settings
        ]
        return {
            "format_version": FORMAT_VERSION,
            "study": self.study.written.model_dump(mode="json"),
            "configurations": {
                setting.name: self.study.runs_of(setting)[0].config.identity() for setting in self.study.settings
            },
            "provenance": provenance(),
            "devices": list(self.devices),
            "settings": settings,
            "full_precision": {str(seed): found for seed, found in self.full_precision.items()},
            "noise_floor": {str(seed): found for seed, found in self.noise_floor.items()},
            "table": [flat_row(row) for row in self.rows()],
        }

    def csv(self) -> str:
        """`results.csv`: one row a setting, empty where nothing is known."""
        flat = [flat_row(row) for row in self.rows()]
        columns = list(dict.fromkeys(key for row in flat for key in row if key != "failed"))
        text = io.StringIO()
        writer = csv.DictWriter(text, [*columns, "failed"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()

    def block_errors(self, name: str) -> dict[int, BlockErrors]:
        """Of a setting, by seed, where they were measured."""
        seeds = self.settings[name].items()
        return {seed: found.block_errors for seed, found in seeds if found.block_errors is not None}

    def _values(self, name: str) -> dict[tuple[int, str], float]:
        seeds = {seed: found.prompts for seed, found in self.settings[name].items()}
        return _by_video(seeds, "psnr_db")


def flat_row(row: Row) -> dict[str, Any]:
    """A row as plain values, for CSV and JSON."""
    axes = row.setting.axes if row.setting is not None else {}
    return {
        "setting": row.name,
        **axes,
        "seeds": len(row.seed_means),
        "n": row.n,
        "psnr_db": row.psnr_db,
        "psnr_db_sd": row.psnr_db_sd,
        **_flat_interval("difference_db", row.difference),
        "worst_5_percent_db": row.worst_db,
        "ssim": row.means.get("ssim"),
        "recognized": row.means.get("recognized"),
        "compression": row.compression,
        "transformer_bytes": row.transformer_bytes,
        "distillation_seconds": row.distillation_seconds,
        "block_error_db": row.block_error_db,
        **_flat_interval("block_error_difference_db", row.block_error_difference),
        "seconds_per_step": row.means.get("seconds_per_step"),
        **{key: value for key, value in row.means.items() if key not in _COLUMN_METRICS},
        "failed": "; ".join(row.failures),
    }


def _flat_interval(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _by_video(seeds: Mapping[int, Prompts], metric: str) -> dict[tuple[int, str], float]:
    return {
        (seed, prompt): float(values[metric])
        for seed, prompts in seeds.items()
        for prompt, values in prompts.items()
        if metric in values
    }


def _row(
    name: str,
    setting: Setting | None,
    seeds: Mapping[int, Prompts],
    reference: Mapping[tuple[int, str], float],
    *,
    sizes: Sequence[SeedResult] = (),
    failures: tuple[str, ...] = (),
) -> Row:
    psnr = _by_video(seeds, "psnr_db")
    seed_means = {
        seed: statistics.fmean(value for (of, _), value in psnr.items() if of == seed)
        for seed in dict.fromkeys(seed for seed, _ in psnr)
    }
    worst = sorted(psnr.values())[: max(1, int(WORST_FRAC * len(psnr)))]
    metrics = dict.fromkeys(
        metric for prompts in seeds.values() for values in prompts.values() for metric in values if metric != "psnr_db"
    )
    return Row(
        name,
        setting,
        seed_means,
        n=len(psnr),
        psnr_db=_mean(seed_means.values()),
        psnr_db_sd=statistics.stdev(seed_means.values()) if len(seed_means) > 1 else None,
        difference=mean_interval([value - reference[video] for video, value in psnr.items() if video in reference]),
        worst_db=_mean(worst),
        means={metric: statistics.fmean(_by_video(seeds, metric).values()) for metric in metrics},
        transformer_bytes=_mean(size.transformer_bytes for size in sizes),
        compression=_mean(size.compression for size in sizes),
        distillation_seconds=_mean(size.distillation_seconds for size in sizes),
        failures=failures,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None
