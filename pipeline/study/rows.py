"""One row of means a setting, from the values of all its videos.

| statistic | unit of the interval |
|---|---|
| velocity SQNR, early-commit error, mean PSNR, and their differences | videos x calibrations, crossed |
| share of forks (Wilson, of the effective number) | videos x calibrations, crossed |
| typical difference of the PSNR (Hodges-Lehmann) | videos; each stands with its typical difference over calibrations |
| forks against the reference's (McNemar) | videos; each stands with its difference over calibrations |
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.study.block_errors import BlockErrors
from pipeline.study.estimators import Estimate, crossed_interval, crossed_share, hodges_lehmann, mcnemar
from pipeline.study.expansion import Setting
from pipeline.study.intervals import Interval
from pipeline.study.quality_scores import THIRDS

FULL_PRECISION = "full precision"
NOISE_FLOOR = "noise floor (bf16, other attention backend)"
WORST_FRAC = 0.05
_COLUMN_METRICS = (
    "psnr_db",
    "velocity_sqnr_db",
    *(f"velocity_sqnr_db_{part}" for part in THIRDS),
    "early_commit_db",
    "ssim",
    "recognized",
    "seconds_per_step",
)

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
    velocity_errors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Relative squared errors of the teacher-forced velocities of every step, by prompt."""
    latent_errors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Relative squared errors of the latents after every step, closed loop, by prompt."""
    step_weights: Sequence[float] | None = None
    """Of the steps, in `velocity_sqnr_db`."""
    decision_steps: int | None = None
    """Steps of the decision phase, after which `early_commit_db` is taken."""
    noise_floor: Prompts = field(default_factory=dict)
    """Teacher-forced scores of the noise floor."""


@dataclass(frozen=True)
class Score:
    """One number of a setting in dB: a mean over videos and calibrations."""

    mean: Interval
    """With its 95 % interval."""
    seed_means: Mapping[int, float]
    """By calibration seed."""
    difference: Interval | None = None
    """To the reference, paired, with its 95 % interval."""


@dataclass(frozen=True)
class Forks:
    """Videos that are another instance than full precision's."""

    share: Estimate
    """With its 95 % interval."""
    p: float | None = None
    """Of the reference having as many."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a setting, full precision, or the noise floor."""

    name: str
    setting: Setting | None
    n: int
    """Videos compared."""
    psnr: Score | None = None
    """Mean over videos: a few forks decide it."""
    velocity: Score | None = None
    """SQNR of the teacher-forced velocity."""
    early_commit: Score | None = None
    """SQNR of the latents at the end of the decision phase."""
    forks: Forks | None = None
    """None where no PSNR is known to part forks from others."""
    typical_difference: Estimate | None = None
    """Of the PSNR to the reference in dB (Hodges-Lehmann), with its 95 % interval."""
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

    @property
    def psnr_db(self) -> float | None:
        """Mean over the seeds' means."""
        return None if self.psnr is None else mean_of(self.psnr.seed_means.values())

    @property
    def psnr_db_sd(self) -> float | None:
        """Standard deviation of the seeds' means; None for one seed."""
        means = [] if self.psnr is None else list(self.psnr.seed_means.values())
        return statistics.stdev(means) if len(means) > 1 else None


def flat_row(row: Row) -> dict[str, Any]:
    """A row as plain values, for CSV and JSON."""
    axes = row.setting.axes if row.setting is not None else {}
    return {
        "setting": row.name,
        **axes,
        "seeds": 0 if row.psnr is None else len(row.psnr.seed_means),
        "n": row.n,
        **_flat_score("velocity_sqnr_db", row.velocity),
        **{f"velocity_sqnr_db_{part}": row.means.get(f"velocity_sqnr_db_{part}") for part in THIRDS},
        **_flat_score("early_commit_db", row.early_commit),
        **_flat_estimate("forks", None if row.forks is None else row.forks.share),
        "forks_p": None if row.forks is None else row.forks.p,
        **_flat_estimate("typical_difference_db", row.typical_difference),
        "psnr_db": row.psnr_db,
        "psnr_db_sd": row.psnr_db_sd,
        **_flat_interval("difference_db", None if row.psnr is None else row.psnr.difference),
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


def _flat_score(name: str, score: Score | None) -> dict[str, float | None]:
    mean, difference = (None, None) if score is None else (score.mean, score.difference)
    return {**_flat_interval(name, mean), **_flat_interval(f"{name}_difference", difference)}


def _flat_estimate(name: str, found: Estimate | None) -> dict[str, float | None]:
    if found is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _flat_interval(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def by_video(seeds: Mapping[int, Prompts], metric: str) -> dict[tuple[int, str], float]:
    return {
        (seed, prompt): float(values[metric])
        for seed, prompts in seeds.items()
        for prompt, values in prompts.items()
        if metric in values
    }


def _by_seed(seeds: Mapping[int, Prompts], metric: str) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for (seed, prompt), value in by_video(seeds, metric).items():
        found.setdefault(seed, {})[prompt] = value
    return found


def _differences(
    seeds: Mapping[int, Prompts], reference: Mapping[int, Prompts], metric: str
) -> dict[int, dict[str, float]]:
    """Paired by calibration and video."""
    base, found = by_video(reference, metric), _by_seed(seeds, metric)
    return {
        seed: {prompt: value - base[seed, prompt] for prompt, value in values.items() if (seed, prompt) in base}
        for seed, values in found.items()
    }


def _score(seeds: Mapping[int, Prompts], reference: Mapping[int, Prompts], metric: str) -> Score | None:
    found = _by_seed(seeds, metric)
    mean = crossed_interval(found)
    if mean is None:
        return None
    means = {seed: statistics.fmean(values.values()) for seed, values in found.items()}
    return Score(mean, means, crossed_interval(_differences(seeds, reference, metric)))


def _forks(seeds: Mapping[int, Prompts], reference: Mapping[int, Prompts], fork_db: float | None) -> Forks | None:
    if fork_db is None:
        return None
    own, against = (
        {seed: {prompt: db < fork_db for prompt, db in psnr.items()} for seed, psnr in _by_seed(by, "psnr_db").items()}
        for by in (seeds, reference)
    )
    share = crossed_share(own)
    return None if share is None else Forks(share, mcnemar(own, against))


def _typical_difference(seeds: Mapping[int, Prompts], reference: Mapping[int, Prompts]) -> Estimate | None:
    by_video: dict[str, list[float]] = {}
    for values in _differences(seeds, reference, "psnr_db").values():
        for prompt, value in values.items():
            by_video.setdefault(prompt, []).append(value)
    typical = (hodges_lehmann(values) for values in by_video.values())
    return hodges_lehmann([found.value for found in typical if found is not None])


def make_row(
    name: str,
    setting: Setting | None,
    seeds: Mapping[int, Prompts],
    reference: Mapping[int, Prompts],
    *,
    fork_db: float | None,
    sizes: Sequence[SeedResult] = (),
    failures: tuple[str, ...] = (),
) -> Row:
    values = sorted(by_video(seeds, "psnr_db").values())
    metrics = dict.fromkeys(
        metric for prompts in seeds.values() for values in prompts.values() for metric in values if metric != "psnr_db"
    )
    return Row(
        name,
        setting,
        n=len(values),
        psnr=_score(seeds, reference, "psnr_db"),
        velocity=_score(seeds, reference, "velocity_sqnr_db"),
        early_commit=_score(seeds, reference, "early_commit_db"),
        forks=_forks(seeds, reference, fork_db),
        typical_difference=_typical_difference(seeds, reference),
        worst_db=mean_of(values[: max(1, int(WORST_FRAC * len(values)))]),
        means={metric: statistics.fmean(by_video(seeds, metric).values()) for metric in metrics},
        transformer_bytes=mean_of(size.transformer_bytes for size in sizes),
        compression=mean_of(size.compression for size in sizes),
        distillation_seconds=mean_of(size.distillation_seconds for size in sizes),
        failures=failures,
    )


def mean_of(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None
