"""A study's runs checked as far as can be known beforehand, and how many units are left once common ones are done once.

What a unit depends on is known before its stage begins, but for the samples that a selection chooses. Until then the count
takes the samples of every selection for different ones, so that from there on it is an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pipeline.config.loading import ConfigError
from pipeline.context import Run, RunContext, build_context, prompt_notes, prompt_refusals
from pipeline.planning.machine import (
    Disk,
    cache_notes,
    disk_of,
    disk_problems,
    refusals,
    run_problems,
    worker_notes,
    worker_problems,
)
from pipeline.planning.model_size import checkpoint_size, copied_bytes, source_tensors
from pipeline.planning.store_size import activation_bytes, evaluation_bytes, trajectory_bytes
from pipeline.planning.token_counts import TokenCounts, count_tokens
from pipeline.run_units import evaluation_names
from pipeline.runner import STAGES
from pipeline.stages.stage import NotDone, Stage, StageUnit
from pipeline.study.expansion import STUDY_FILE, Study, StudyRun
from pipeline.study.models import ModelKey, fingerprints_of, model_key, pinned_study
from pipeline.terminal import counted, human_bytes, new_table, say, say_sentence, say_table
from storage.cache import Cache, DamagedRecord, UnitRecord
from storage.lock import LOCK_FILE
from storage.run_directory import RunDirectory


@dataclass
class StageCount:
    """Units of one stage over all runs."""

    name: str
    separate: int = 0
    """If every run did its own."""
    shared: int = 0
    """With common ones done once."""
    done: int = 0
    """Of those, done already."""
    at_most: bool = False
    """Whether `shared` may turn out smaller."""
    unknown_runs: int = 0
    """Runs whose units cannot be known before an earlier stage is done; they are not in the numbers."""
    disk_bytes: float = 0.0
    """What the shared ones write."""


@dataclass
class PreparedStudy:
    """A study, its contexts by run label, and what is in its way."""

    study: Study
    contexts: Mapping[str, RunContext]
    counts: tuple[StageCount, ...]
    disk: Disk
    problems: list[str]
    notes: list[str] = field(default_factory=list)

    def require_feasible(self) -> None:
        """Stops a study that would fail.

        Raises:
            ConfigError: lists all problems.
        """
        if self.problems:
            raise ConfigError(self.problems)

    def show(self, console: Console) -> None:
        """Prints numbers of runs and units, notes and problems."""
        num_seeds = len(self.study.written.seeds)
        settings = len(self.study.settings)
        grid = f"{counted(settings, 'setting')} x {counted(num_seeds, 'seed')}"
        say(console, ("study", "bold"), f"  {self.study.location}")
        say(console, ("runs", "bold"), f"   {len(self.study.runs)}: {grid}")
        console.line()
        table = new_table("Stage", "Separately", "Shared", "Done", "Disk")
        for count in self.counts:
            table.add_row(
                count.name.capitalize(),
                f"{count.separate:,}",
                f"{'at most ' if count.at_most else ''}{count.shared:,}{' + ?' if count.unknown_runs else ''}",
                f"{count.done:,}" if count.done else "-",
                human_bytes(count.disk_bytes) if count.disk_bytes else "-",
            )
        say_table(console, table)
        for note in self.notes:
            say_sentence(console, ("note:", "yellow"), f" {note}")
        for problem in self.problems:
            say_sentence(console, ("problem:", "bold red"), f" {problem}")
        if not self.problems:
            say(console, ("Ready to run.", "green"))


def prepare_study(study: Study, stages: tuple[Stage, ...] = STAGES, *, update: bool = False) -> PreparedStudy:
    """Reads models and prompts once, and checks every setting; units and bytes are those of `stages`, the first ones in order.

    Args:
        update: runs may have been made with other configurations.

    Raises:
        ConfigError: prompts or model are not usable enough to count units; everything else that is wrong is listed too.
    """
    try:
        study, model_notes = pinned_study(study)
    except ConfigError as error:
        raise ConfigError([*error.problems, *worker_problems(study.runs[0].config)]) from error
    fingerprints, problems = fingerprints_of(study)
    by_setting, found = _by_setting(study, fingerprints, model_notes)
    for problem, settings in found.items():
        of_some = len(settings) < len(study.settings)
        if problem not in problems:
            problems.append(f"{', '.join(f'setting {name!r}' for name in settings)}: {problem}" if of_some else problem)
    first = study.runs[0].config
    place = run_problems(study.location, first.model) or directory_problems(RunDirectory(study.location))
    if not place:
        place = [problem for run in study.runs for problem in refusals(run.config, update=update)]
    problems += [*worker_problems(first), *place]
    if len(by_setting) < len(study.settings):
        raise ConfigError(list(dict.fromkeys(problems)))
    contexts = {run.label: replace(by_setting[run.setting.slug], config=run.config) for run in study.runs}
    if not place:
        problems += [problem for context in contexts.values() for problem in prompt_refusals(context, update=update)]
    counts = _Counting(study, contexts).counts(stages)
    disk = disk_of(study.location)
    problems += [
        f"{problem}; or make the study smaller"
        for problem in disk_problems(study.location, int(sum(count.disk_bytes for count in counts)), disk)
    ]
    notes = [note for note in model_notes.values() if note is not None]
    notes += dict.fromkeys(note for context in by_setting.values() for note in cache_notes(context.model.found))
    notes += dict.fromkeys(note for context in by_setting.values() for note in prompt_notes(context))
    notes += worker_notes(first)
    if any(count.at_most for count in counts):
        notes.append(
            "which samples the selections choose is not known yet: what they have in common is done once, and settings that "
            "choose the same samples share more than is counted here"
        )
    notes += [
        f"{count.name}: what {count.unknown_runs} runs do depends on results of earlier stages and is not counted"
        for count in counts
        if count.unknown_runs
    ]
    return PreparedStudy(study, contexts, counts, disk, list(dict.fromkeys(problems)), notes)


def _by_setting(
    study: Study, fingerprints: Mapping[ModelKey, str], model_notes: Mapping[ModelKey, str | None]
) -> tuple[dict[str, RunContext], dict[str, list[str]]]:
    """Contexts by slug of those settings that have one, and what is wrong with which settings."""
    contexts: dict[str, RunContext] = {}
    problems: dict[str, list[str]] = {}
    for setting in study.settings:
        config = study.runs_of(setting)[0].config
        try:
            context = build_context(config, weights=False)
            found = context.model.found.named(count_tokens(context).problems)
            key = model_key(config)
            contexts[setting.slug] = replace(context, model_fingerprint=fingerprints[key], model_note=model_notes[key])
        except ConfigError as error:
            found = list(error.problems)
        for problem in found:
            problems.setdefault(problem, []).append(setting.name)
    return contexts, problems


def directory_problems(directory: RunDirectory) -> list[str]:
    """Why the study's directory, as it is now, cannot hold one."""
    place, files = directory.location, directory.place
    if isinstance(place, Path) and place.exists() and not place.is_dir():
        return [f"study: {place} is a file: give a directory for the study"]
    names = files.names()
    foreign = sorted({*names, *files.subfolders()} - {LOCK_FILE})
    if foreign and STUDY_FILE not in names:
        held = ", ".join(foreign[:5])
        return [f"study: {place} is not empty and not a study (holds {held}): give a new or empty directory"]
    return []


class _Counting:
    """Goes through the stages as the driver will, writing nothing: units that will be done count as done."""

    def __init__(self, study: Study, contexts: Mapping[str, RunContext]) -> None:
        self._runs = [
            (run, Run(contexts[run.label], RunDirectory(run.location), Cache(contexts[run.label].cache_location)))
            for run in study.runs
        ]
        self._guessed: set[str] = set()
        """Labels of the runs whose choice of samples was made up."""
        self._sizes: dict[str, dict[str, float]] = {}
        self._choices: dict[tuple[str, ...], set[str]] = {}
        """Selections that are not done, by fingerprints of the trajectories that they choose from."""

    def counts(self, stages: tuple[Stage, ...]) -> tuple[StageCount, ...]:
        return tuple(self._stage(stage) for stage in stages)

    def _stage(self, stage: Stage) -> StageCount:
        count = StageCount(stage.name)
        seen: set[str] = set()
        for planned, run in self._runs:
            try:
                plans = stage.plan(run)
            except NotDone:  # it reads a result that is not there yet
                count.unknown_runs += 1
                continue
            for plan in plans:
                try:
                    unit = plan.make()
                except LookupError:  # so does this one, or it depends on a unit that was not known
                    count.unknown_runs += 1
                    break
                count.separate += 1
                count.at_most |= planned.label in self._guessed
                real = _recorded(run, stage.name, unit)
                result = {} if real is None else real.result
                if stage.name == "selection" and real is None:
                    result = {"chosen": self._made_up(planned.label, run, unit.fingerprint)}
                run.records.add(_planned(stage.name, unit.name, unit.fingerprint, result))
                if unit.fingerprint not in seen:
                    seen.add(unit.fingerprint)
                    count.done += real is not None
                    count.disk_bytes += self._unit_bytes(planned, run.context).get(stage.name, 0.0)
        count.shared = len(seen)
        # Choices from different trajectories have nothing in common, whatever they are.
        count.at_most &= any(len(chosen) > 1 for chosen in self._choices.values())
        return count

    def _made_up(self, label: str, run: Run, fingerprint: str) -> list[dict[str, Any]]:
        """As many samples as will be chosen, different for every selection."""
        self._guessed.add(label)
        trajectories = (run.records.read("trajectories", p.name) for p in run.context.calibration_prompts)
        upstream = tuple(record.fingerprint for record in trajectories if record is not None)
        self._choices.setdefault(upstream, set()).add(fingerprint)
        chosen: list[dict[str, Any]] = [
            {"prompt": f"{fingerprint}-{index // len(steps)}", "step": steps[index % len(steps)]}
            for steps in run.context.steps.values()
            for index in range(run.context.config.selection.num_samples)
        ]
        for prompt in dict.fromkeys(sample["prompt"] for sample in chosen):
            run.records.add(_planned("trajectories", prompt, fingerprint, {}))
        return chosen

    def _unit_bytes(self, run: StudyRun, context: RunContext) -> dict[str, float]:
        """Bytes of one unit of each stage on average; seeds do not matter."""
        key = run.setting.slug
        if key not in self._sizes:
            self._sizes[key] = unit_bytes(context, count_tokens(context))
        return self._sizes[key]


def unit_bytes(context: RunContext, counts: TokenCounts) -> dict[str, float]:
    """What one unit of each stage writes on average; nothing is known of a model whose shapes cannot run."""
    if counts.problems:
        return {}
    config = context.config
    auto = torch.bfloat16 if config.workers.num_gpus > 0 else torch.float32
    dtype = auto if config.numerics.dtype == "auto" else getattr(torch, config.numerics.dtype)
    size = checkpoint_size(
        context.model,
        context.methods[0],
        tensors=source_tensors(context.model),
        component_bytes=copied_bytes(context.model.folder, variant=context.model.variant),
    )
    roles = len(context.model.roles)
    return {
        "trajectories": trajectory_bytes(context, counts, dtype) / len(context.calibration_prompts),
        "activations": activation_bytes(context, counts, dtype) / (roles * config.selection.num_samples),
        "distillation": size.artifact_bytes / (roles * (len(context.segments) + 1)),
        "assembly": size.folder_bytes,
        "evaluation": evaluation_bytes(context, counts) / len(evaluation_names(config)),
    }


def _planned(stage: str, unit: str, fingerprint: str, result: Mapping[str, Any]) -> UnitRecord:
    return UnitRecord(stage, unit, fingerprint, None, (), dict(result), 0.0, "", "", 0, 1, "")


def _recorded(run: Run, stage: str, unit: StageUnit) -> UnitRecord | None:
    """The unit's record, if it is done; of one that is damaged the driver will say what is wrong, and do it again."""
    try:
        record = run.cache.read(stage, unit.fingerprint)
    except DamagedRecord:
        return None
    return None if record is not None and unit.in_run and not run.directory.has(unit.payload.checkpoint) else record
