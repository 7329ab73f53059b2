"""What a study measured: every video's values by setting, seed and prompt, and one row of means a setting.

`results.json` holds everything, `results.csv` the rows. Every calibration seed meets the same held-out prompts with the same
noises, so videos and calibrations are crossed factors: an interval of a mean covers both (`estimators.crossed_interval`).
Differences are paired by video and calibration.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.provenance import provenance
from pipeline.study.block_errors import BlockErrors, difference_interval
from pipeline.study.estimators import valley
from pipeline.study.expansion import Study
from pipeline.study.rows import (
    FULL_PRECISION,
    NOISE_FLOOR,
    Prompts,
    Row,
    SeedResult,
    by_video,
    flat_row,
    make_row,
    mean_of,
)

FORMAT_VERSION = 1


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
        reference, fork_db = self.study.written.reference, self.fork_db()
        against = self._prompts(reference) if reference is not None else {}
        blocks_against = self.block_errors(reference) if reference is not None else {}
        rows = []
        for setting in self.study.rows:
            seeds = self.settings[setting.name]
            failures = tuple(f"seed {seed}: {found.failure}" for seed, found in seeds.items() if found.failure)
            others = {} if setting.name == reference else against
            row = make_row(
                setting.name,
                setting,
                self._prompts(setting.name),
                others,
                fork_db=fork_db,
                sizes=list(seeds.values()),
                failures=failures,
            )
            errors = self.block_errors(setting.name)
            apart = difference_interval(errors, blocks_against) if setting.name != reference else None
            mean_db = mean_of(found.mean_db for found in errors.values())
            rows.append(replace(row, block_error_db=mean_db, block_error_difference=apart))
        for name, found in ((FULL_PRECISION, self.full_precision), (NOISE_FLOOR, self.noise_floor)):
            if found:
                rows.append(make_row(name, None, found, {}, fork_db=fork_db))
        return rows

    def fork_db(self) -> float | None:
        """The PSNR below which a video is a fork: as configured, if all settings agree, otherwise the valley between the two
        modes of all PSNRs; None where there is none."""
        configured = {run.config.evaluation.fork_db for run in self.study.runs} - {None}
        if len(configured) == 1:
            return configured.pop()
        return valley([value for setting in self.settings for value in self._values(setting).values()])

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
            for setting in self.study.rows
        ]
        return {
            "format_version": FORMAT_VERSION,
            "study": self.study.written.model_dump(mode="json"),
            "configurations": {
                setting.name: self.study.runs_of(setting)[0].config.identity() for setting in self.study.settings
            },
            "provenance": provenance(),
            "devices": list(self.devices),
            "fork_db": self.fork_db(),
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

    def _prompts(self, name: str) -> dict[int, Prompts]:
        return {seed: found.prompts for seed, found in self.settings[name].items() if found.prompts}

    def _values(self, name: str) -> dict[tuple[int, str], float]:
        return by_video(self._prompts(name), "psnr_db")
