"""The models of a study's runs: each at one commit in all of them, and read once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config.loading import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.context import check_found
from pipeline.hub_model import find_model, pinned
from pipeline.planning.machine import cache_problems
from pipeline.study.expansion import Study

ModelKey = tuple[Path, str | None, str | None]


def model_key(config: RunConfig) -> ModelKey:
    """Folder or id, commit, variant."""
    return config.model, config.model_commit, config.model_variant


def pinned_study(study: Study) -> tuple[Study, dict[ModelKey, str | None]]:
    """The study with every model of the Hub at one commit in all its runs, and one line about each by `model_key`.

    Raises:
        ConfigError: a model cannot be one of the Hub, or the Hub does not tell its commit.
    """
    places = [run.location for run in study.runs]
    found: dict[ModelKey, tuple[str | None, str | None]] = {}
    runs, notes = [], {}
    for run in study.runs:
        config = run.config
        asked = (config.model, config.model_revision, config.model_commit)
        if asked not in found:
            resolved, note = pinned(config, others=places)
            found[asked] = (resolved.model_commit, note)
        commit, note = found[asked]
        config = config.model_copy(update={"model_commit": commit})
        runs.append(replace(run, config=config))
        notes[model_key(config)] = note
    return replace(study, runs=tuple(runs)), notes


def fingerprints_of(study: Study) -> tuple[dict[ModelKey, str], list[str]]:
    """Fingerprints of the models by `model_key`; every weight that is here is read once."""
    fingerprints: dict[ModelKey, str] = {}
    problems: list[str] = []
    for run in study.runs:
        key = model_key(run.config)
        if key in fingerprints:
            continue
        fingerprints[key] = ""
        try:
            found = find_model(run.config)
        except ConfigError as error:
            problems += error.problems
            continue
        checked = check_found(found, variant=run.config.model_variant, weights=True)
        problems += [*checked.problems, *cache_problems(found)]
        fingerprints[key] = checked.fingerprint
    return fingerprints, problems
