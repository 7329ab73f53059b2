"""Says before a run what it takes and why it would fail: no weights are loaded, no GPU is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
import torch
from rich.console import Console

from pipeline.config.loading import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.context import PROMPT_FILES, RunContext, absent_prompts, build_context, prompt_notes, prompt_refusals
from pipeline.hub_model import fetch_model, pinned
from pipeline.phase import phase
from pipeline.planning.machine import (
    cache_notes,
    cache_problems,
    disk_of,
    disk_problems,
    is_remote,
    lock_notes,
    refusals,
    run_problems,
    worker_notes,
    worker_problems,
)
from pipeline.planning.model_size import CheckpointSize, checkpoint_size, copied_bytes, repaired_bytes, source_tensors
from pipeline.planning.plan_result import Plan, StagePlan
from pipeline.planning.planned_calls import band_problems, call_problems
from pipeline.planning.stage_memory import stage_peaks
from pipeline.planning.store_size import activation_bytes, evaluation_bytes, trajectory_bytes
from pipeline.planning.token_counts import TokenCounts, count_tokens
from pipeline.run_units import num_units
from pipeline.terminal import say


def plan_config(config: RunConfig, *, shapes_only: bool = False, update: bool = False) -> Plan:
    """The plan of a configuration, with all that is wrong with it in `problems` as far as a plan can be made at all.

    Args:
        shapes_only: for planning on another machine: weights are neither needed nor read, and what this machine lacks,
            prompt files too, is a note.
        update: the run may have been made with another configuration.

    Raises:
        ConfigError: prompts or model are not usable enough to plan with; everything else that is wrong is listed too.
    """
    found: tuple[str, ...] = ()
    may_lack = PROMPT_FILES if shapes_only else ()
    try:
        try:
            context = build_context(config, weights=not shapes_only, may_lack=may_lack)
        except ConfigError as error:
            found = error.problems
            context = build_context(config, weights=False, may_lack=may_lack)
        plan = make_plan(context, shapes_only=shapes_only, update=update)
    except Exception as error:
        more = error.problems if isinstance(error, ConfigError) else ()
        if not (found or more):
            raise
        # A model that is not sound may break its planning anywhere: what was found says why.
        machine = [] if shapes_only else worker_problems(config)
        if not shapes_only:
            with contextlib.suppress(ConfigError):  # what the run has cannot be compared with a model without a commit
                machine += _run_problems(pinned(config)[0], config.model, update=update)
        raise ConfigError(list(dict.fromkeys([*found, *more, *machine]))) from error
    plan.problems[:] = dict.fromkeys([*found, *plan.problems])
    return plan


def fetched(plan: Plan, console: Console, *, update: bool) -> Plan:
    """A feasible plan whose model is on this machine: one of the Hub is named, fetched as far as its cache lacks it, and
    checked again.

    Raises:
        ConfigError: the fetched weights are not right.
        OSError: they cannot be fetched.
    """
    context = plan.context
    if not said_and_fetched([context], console):
        return plan
    with phase(console, "Checking the model"):
        plan = plan_config(context.config, update=update)
        plan.require_feasible()
    return plan


def said_and_fetched(contexts: Iterable[RunContext], console: Console) -> bool:
    """Says at which commits models of the Hub are, and fetches what its cache lacks of them; whether it lacked anything.

    Raises:
        OSError: a model cannot be fetched.
    """
    contexts = tuple(contexts)
    for note in dict.fromkeys(context.model_note for context in contexts):
        if note is not None:
            say(console, note)
    outlines = {found.snapshot: found for context in contexts if (found := context.model.found).is_outline}
    for found in outlines.values():
        say(console, *cache_notes(found))
        fetch_model(found)
    return bool(outlines)


def make_plan(context: RunContext, *, shapes_only: bool = False, update: bool = False) -> Plan:
    """The plan of a checked run; nothing is written."""
    config, model = context.config, context.model
    counts = count_tokens(context)
    if "calibration" in context.absent_prompts:  # they may be as long as they like
        counts.text = dict.fromkeys(counts.text, counts.size.num_text)
    on_gpu = config.workers.num_gpus > 0
    dtype = {"auto": torch.bfloat16 if on_gpu else torch.float32}.get(config.numerics.dtype) or getattr(
        torch, config.numerics.dtype
    )
    copied, tensors = copied_bytes(model.folder, variant=model.variant), source_tensors(model)
    checkpoints = tuple(
        checkpoint_size(model, method, tensors=tensors, component_bytes=copied) for method in context.methods
    )
    if not counts.problems:
        counts.problems += call_problems(context, counts, dtype)
    if not counts.problems:
        counts.problems += band_problems(context, counts, dtype)
    # Shapes that cannot run cannot be counted either.
    peaks = {} if counts.problems else stage_peaks(context, counts, dtype)
    stages = _stages(context, counts, dtype, checkpoints=checkpoints, peaks=peaks)
    disk = disk_of(config.cache or config.run)
    no_run = _run_problems(config, model.folder, update=update)
    no_run += [problem for problem in prompt_refusals(context, update=update) if problem not in no_run]
    machine = [
        *cache_problems(model.found),
        *worker_problems(config),
        *(no_run or disk_problems(config.cache or config.run, sum(s.disk_bytes for s in stages), disk)),
    ]
    lacking, machine = ([*absent_prompts(context), *machine], []) if shapes_only else ([], machine)
    notes = [
        *counts.notes,
        *cache_notes(model.found),
        *prompt_notes(context),
        *worker_notes(config),
        *(() if no_run else lock_notes(config.run)),
        *(f"here it would not run: {problem}" for problem in lacking),
    ]
    if on_gpu and torch.cuda.is_available():
        notes += _memory_notes(stages, torch.cuda.get_device_properties(0).total_memory, "on a GPU, this one has")
    elif not (on_gpu or is_remote(config)):
        notes += _memory_notes(stages, psutil.virtual_memory().total, "in a worker, this machine has")
    problems = [*model.found.named(counts.problems), *machine]
    return Plan(context, counts, dtype, stages, checkpoints, disk, problems, notes, lacking)


def _run_problems(config: RunConfig, model: Path, *, update: bool) -> list[str]:
    cache = [] if config.cache is None else run_problems(config.cache, model, key="cache")
    return [*(run_problems(config.run, model) or refusals(config, update=update)), *cache]


def _stages(
    context: RunContext,
    counts: TokenCounts,
    dtype: torch.dtype,
    *,
    checkpoints: tuple[CheckpointSize, ...],
    peaks: Mapping[str, int],
) -> tuple[StagePlan, ...]:
    units = num_units(context.config, num_segments=len(context.segments), num_roles=len(context.model.roles))
    disk_bytes = {
        "trajectories": trajectory_bytes(context, counts, dtype),
        "activations": activation_bytes(context, counts, dtype),
        "distillation": sum(size.artifact_bytes for size in checkpoints),
        "refinement": sum(repaired_bytes(context.model, m) for m in context.methods if m.recipe.drift_repair),
        "assembly": sum(size.folder_bytes for size in checkpoints),
        "evaluation": evaluation_bytes(context, counts),
    }

    def stage(name: str, num: int) -> StagePlan:
        return StagePlan(name, name.capitalize(), num, disk_bytes.get(name, 0), peaks.get(name) if num else None)

    return tuple(stage(name, num or 0) for name, num in units.items())


def _memory_notes(stages: tuple[StagePlan, ...], memory_bytes: int, where: str) -> list[str]:
    return [
        f"{stage.name} takes about {stage.peak_memory_bytes / 2**30:.1f} GiB {where} {memory_bytes / 2**30:.1f}"
        for stage in stages
        if stage.peak_memory_bytes is not None and stage.peak_memory_bytes > memory_bytes
    ]
