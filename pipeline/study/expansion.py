"""A study's file: a grid of settings over seeds, expanded to runs and checked as a whole before any work. Imports no torch.

Every expanded (setting, seed) is an ordinary run in `<study>/seed-<seed>/<slug of the setting's name>/`.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from pipeline.config.loading import ConfigError, described, parse_config, parse_override, read_values, set_value
from pipeline.config.schema import LocalPath, RunConfig, RunLocation
from pipeline.config.section import Section
from storage.location import Location
from storage.run_directory import CACHE

STUDY_FILE = "study.json"
"""Says that a directory is a study; as the file was written the last time it was driven."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_LONGEST_SLUG = 100
_OWN_KEYS = {
    "run": "the study gives every run its directory",
    "seed": "give all seeds in `seeds`",
}


class SettingConfig(Section):
    """One setting, or one for every combination of the values of `axes`."""

    name: str = Field(min_length=1)
    """Of folders, tables and plots; `{key}` stands for the value of an axis."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides: dotted keys of the run's configuration."""
    axes: dict[str, list[Any]] = Field(default_factory=dict)
    """Dotted keys, each with the values that it takes."""

    @model_validator(mode="after")
    def _check(self) -> SettingConfig:
        for key, values in self.axes.items():
            if not values:
                raise ValueError(f"setting {self.name!r}: the axis {key} has no values; give some, or leave it out")
            if key in self.set:
                raise ValueError(f"setting {self.name!r}: {key} is in set and in axes; keep one")
        return self


class StudyConfig(Section):
    """The file as it is written."""

    study: RunLocation
    """The study's directory: a path, or s3://bucket/prefix."""
    config: LocalPath | dict[str, Any]
    """Base of all runs' configurations, a file or what would stand in it; its `run` and `seed` are ignored."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of all settings."""
    seeds: tuple[int, ...] = (0,)
    """Each of them decides all that is random in the calibration of one run a setting. The noises of the evaluation are the
    same for all: those of the first seed, or of `evaluation.seed`."""
    reference: str | None = None
    """Name of the setting to which paired differences are given."""
    noise_floor: bool = False
    """Sets `evaluation.noise_floor` in all runs."""
    settings: tuple[SettingConfig, ...]

    def base(self) -> dict[str, Any]:
        """The values of `config`. Raises ConfigError for a file that cannot be read."""
        return dict(self.config) if isinstance(self.config, dict) else read_values(self.config)

    @property
    def base_name(self) -> str:
        """Of `config`, for people."""
        return "config" if isinstance(self.config, dict) else str(self.config)

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        if not self.settings:
            raise ValueError("settings is empty: give one or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are {list(self.seeds)}: give one or more, each once, 0 or more")
        return self


@dataclass(frozen=True)
class Setting:
    """One row of the results."""

    name: str
    slug: str
    """Of its run directories."""
    overrides: Mapping[str, Any]
    """By dotted key: those of the study, of the setting and of its place on the axes, in this order."""
    axes: Mapping[str, Any]
    """Its place on them."""
    group: int | None
    """Index of the file's setting that it comes from; None for another setting of one's checkpoint."""


@dataclass(frozen=True)
class StudyRun:
    """One setting with one seed."""

    setting: Setting
    seed: int
    config: RunConfig

    @property
    def label(self) -> str:
        """Its directory in the study's."""
        return run_label(self.seed, self.setting.slug)

    @property
    def location(self) -> Location:
        """Its directory."""
        return self.config.run.absolute()

    @property
    def rows(self) -> tuple[Setting, ...]:
        """What it measures: its setting, then the other settings of its checkpoint."""
        own = self.setting
        others = [
            replace(
                own,
                name=f"{own.name} / {name}",
                overrides={**own.overrides, f"evaluation.settings.{name}": knobs.knobs()},
                axes={},
                group=None,
            )
            for name, knobs in self.config.evaluation.settings.items()
        ]
        return own, *others


@dataclass(frozen=True)
class Study:
    """A checked file."""

    location: Location
    written: StudyConfig
    settings: tuple[Setting, ...]
    runs: tuple[StudyRun, ...]
    """Seed by seed, the settings in the file's order."""

    @property
    def rows(self) -> tuple[Setting, ...]:
        """Rows of its tables: every setting, and behind it the other settings of its checkpoint."""
        return tuple(row for setting in self.settings for row in self.runs_of(setting)[0].rows)

    def runs_of(self, setting: Setting) -> list[StudyRun]:
        """One a seed."""
        return [run for run in self.runs if run.setting is setting]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in `path`; `overrides` (`key.path=value` of the runs' configuration) come last in all settings.

    Relative paths are relative to the working directory.

    Raises:
        ConfigError: everything that is wrong with the file, the base configuration and any setting, at once.
    """
    values = read_values(path)
    if "run" in values and "study" not in values:
        raise ConfigError([f"{path} is the file of a run: use `run {path}`, or `plan {path}` for its plan"])
    try:
        written = StudyConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{path}: {problem}" for problem in described(error)]) from error
    base = written.base()
    last = dict(parse_override(override) for override in overrides)
    settings, problems = _expand(written, last)
    runs, config_problems = _configurations(written, settings, base)
    rows = list(
        dict.fromkeys([*(setting.name for setting in settings), *(row.name for run in runs for row in run.rows)])
    )
    if written.reference is not None and written.reference not in rows:
        names = ", ".join(map(repr, rows))
        problems.append(f"reference: no setting is named {written.reference!r}; there are {names}")
    problems = [*problems, *config_problems] or _not_shared([run.config for run in runs])
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return Study(written.study, written, settings, tuple(runs))


def run_label(seed: int, slug: str) -> str:
    """Directory of a run in its study."""
    return f"seed-{seed}/{slug}"


def slug_of(name: str) -> str:
    """A folder's name for a setting: letters, digits and `. _ = + -`, never empty, never beginning with a dot."""
    slug = re.sub(r"[^A-Za-z0-9._=+]+", "-", name).strip("-._")
    return slug[:_LONGEST_SLUG].rstrip("-._") or "setting"


def _expand(written: StudyConfig, last: Mapping[str, Any]) -> tuple[tuple[Setting, ...], list[str]]:
    settings: list[Setting] = []
    problems = _own_keys("set", written.set) + _own_keys("--set", last)
    for group, setting in enumerate(written.settings):
        problems += _own_keys(f"setting {setting.name!r}", [*setting.set, *setting.axes])
        unknown = [key for key in _PLACEHOLDER.findall(setting.name) if key not in setting.axes]
        if unknown:
            known = ", ".join(setting.axes) or "none"
            problems.append(f"setting {setting.name!r}: its name uses {{{unknown[0]}}}, its axes are: {known}")
            continue
        for values in itertools.product(*setting.axes.values()):
            place = dict(zip(setting.axes, values, strict=True))
            name = _filled(setting.name, place)
            floor = {"evaluation.noise_floor": True} if written.noise_floor else {}
            overrides = {**floor, **_later(written.set, setting.set, place, last)}
            settings.append(Setting(name, slug_of(name), overrides, place, group))
    return tuple(settings), problems + _name_problems(settings)


def _filled(template: str, place: Mapping[str, Any]) -> str:
    return _PLACEHOLDER.sub(lambda match: _text(place[match[1]]), template)


def _later(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of all layers, a key at the place of its last mention: a whole method replaces what was set inside it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            merged.pop(key, None)
            merged[key] = value
    return merged


def _own_keys(where: str, keys: Iterable[str]) -> list[str]:
    return [f"{where}: {key} cannot be set in a study: {_OWN_KEYS[key]}" for key in keys if key in _OWN_KEYS]


def _name_problems(settings: Sequence[Setting]) -> list[str]:
    problems = []
    names: dict[str, int] = {}
    folders: dict[str, list[str]] = {}
    for setting in settings:
        names[setting.name] = names.get(setting.name, 0) + 1
        # Lower case: some file systems do not tell the others apart.
        same = folders.setdefault(setting.slug.lower(), [])
        if setting.name not in same:
            same.append(setting.name)
    for name, num in names.items():
        if num > 1:
            problems.append(
                f"settings: {num} are named {name!r}; give each its name (an axis shows in it as {{key}}, every value once)"
            )
    for slug, same in folders.items():
        if len(same) > 1:
            listed = " and ".join(repr(name) for name in same)
            problems.append(f"settings: {listed} would share the folder {slug!r}; make their letters and digits differ")
    return problems


def _configurations(
    written: StudyConfig, settings: Sequence[Setting], base: Mapping[str, Any]
) -> tuple[list[StudyRun], list[str]]:
    found: dict[str, list[str]] = {}
    """By message, the settings that have the problem."""
    runs = []
    for seed in written.seeds:
        for setting in settings:
            try:
                runs.append(StudyRun(setting, seed, _configuration(written, setting, seed, base)))
            except ConfigError as error:
                for problem in error.problems:
                    names = found.setdefault(problem, [])
                    if setting.name not in names:
                        names.append(setting.name)
    return runs, list(_by_setting(found, len({setting.name for setting in settings}), written.base_name))


def _configuration(written: StudyConfig, setting: Setting, seed: int, base: Mapping[str, Any]) -> RunConfig:
    values = copy.deepcopy(dict(base))
    problems: list[str] = []
    for key, value in setting.overrides.items():
        try:
            set_value(values, key, value, where=f"{key}={_text(value)}")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    values["seed"] = seed
    evaluation = values.setdefault("evaluation", {})
    if isinstance(evaluation, dict) and evaluation.get("seed") is None:
        # Every calibration seed meets the same noises, so that the two factors are crossed.
        evaluation["seed"] = written.seeds[0]
    values["run"] = str(written.study / run_label(seed, setting.slug))
    if values.get("cache") is None:
        values["cache"] = str(written.study / CACHE)
    try:
        config = parse_config(values, "")
    except ConfigError as error:
        raise ConfigError([problem.removeprefix(": ") for problem in error.problems]) from error
    if config.compare:
        names = ", ".join(method.name for method in config.compare)
        raise ConfigError(
            [
                f"compare holds {names}, but a setting is one method: put `compare: []` into set, and make settings of them"
            ]
        )
    return config


def _by_setting(found: Mapping[str, Sequence[str]], num_settings: int, base: str) -> Iterator[str]:
    """What all settings have in common is said once."""
    for problem, names in found.items():
        if len(names) == num_settings:
            yield (
                f"{base} with the study's overrides: {problem}"
                if num_settings > 1
                else f"setting {names[0]!r}: {problem}"
            )
        else:
            for name in names:
                yield f"setting {name!r}: {problem}"


def _not_shared(configs: Sequence[RunConfig]) -> list[str]:
    """All runs share one pool of workers."""
    problems: list[str] = []
    for key, values in (
        ("cache", [config.cache for config in configs]),
        ("workers", [config.workers for config in configs]),
        ("cluster", [config.cluster for config in configs]),
        ("numerics.threads", [config.numerics.threads for config in configs]),
    ):
        if any(value != values[0] for value in values):
            problems.append(
                f"{key} differs between settings, but all runs of a study share it: set it for all or in the base"
            )
    return problems


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
