"""Reads what the runs of a study measured from their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.context import Run
from pipeline.run_units import FULL_PRECISION as FULL_PRECISION_MODEL
from pipeline.run_units import NOISE_FLOOR as NOISE_FLOOR_MODEL
from pipeline.run_units import evaluated_models, evaluation_name, part_name, prompt_names
from pipeline.stages.distillation import parts
from pipeline.stages.evaluation import Evaluation
from pipeline.stages.selection import selected_samples
from pipeline.stages.stage import require_all
from pipeline.study.block_errors import BlockErrors
from pipeline.study.driver import Failure, StudyOutcome
from pipeline.study.expansion import Study, StudyRun
from pipeline.study.quality_scores import recorded
from pipeline.study.results import StudyResults
from pipeline.study.rows import FULL_PRECISION, NOISE_FLOOR, Prompts, SeedResult
from storage.cache import UnitRecord, fingerprint


def collect_results(study: Study, outcome: StudyOutcome) -> StudyResults:
    """Reads what the runs measured. Of a run that failed before its evaluation nothing is taken: what lies there may be of an
    older configuration."""
    settings: dict[str, dict[int, SeedResult]] = {row.name: {} for row in study.rows}
    shared: dict[str, dict[int, dict[str, UnitRecord]]] = {FULL_PRECISION: {}, NOISE_FLOOR: {}}
    ambiguous, devices = False, []
    for planned in study.runs:
        failure = outcome.failures.get(planned.label)
        results, records = _seed_results(planned, outcome.runs[planned.label], failure)
        for name, result in results.items():
            settings[name][planned.seed] = result
        for kind, found in records.items():
            devices += [record.device for record in found.values()]
            known = shared[kind].setdefault(planned.config.evaluation_seed, {}) if kind in shared else {}
            for prompt, record in found.items():
                ambiguous |= known.setdefault(prompt, record).fingerprint != record.fingerprint and kind in shared
    full, floor = ({} if ambiguous else _numbers_by_seed(found) for found in shared.values())
    for planned in study.runs:
        seed = planned.config.evaluation_seed
        if seed in floor:
            scores = settings[planned.setting.name][planned.seed].noise_floor
            floor[seed] = _merged(floor[seed], scores)
    return StudyResults(study, settings, full, floor, tuple(dict.fromkeys(devices)))


def _seed_results(
    planned: StudyRun, run: Run, failure: Failure | None
) -> tuple[dict[str, SeedResult], dict[str, dict[str, UnitRecord]]]:
    """The results of the setting and of the other settings of its checkpoint, by row, and the evaluation's records by kind (a
    row's own under its name) and prompt."""
    message = None if failure is None else str(failure)
    evaluated = (run.context.methods[0].name, *planned.config.evaluation.settings)
    models = dict(zip(evaluated, (row.name for row in planned.rows), strict=True))
    if failure is not None and failure.stage != Evaluation.name:
        return {row: SeedResult(planned.label, message) for row in models.values()}, {}
    config = run.context.config
    rows = {FULL_PRECISION_MODEL: FULL_PRECISION, NOISE_FLOOR_MODEL: NOISE_FLOOR, **models}
    records: dict[str, dict[str, UnitRecord]] = {}
    for model in evaluated_models(config):
        for prompt in prompt_names(config.prompts.num_held_out):
            record = run.records.read(Evaluation.name, evaluation_name(model, prompt))
            if record is not None:
                records.setdefault(rows[model], {})[prompt] = record
    errors = recorded(config, partial(_result, run))
    assembled = run.records.read("assembly", run.context.methods[0].name)
    size = {} if assembled is None else assembled.result
    distilled = _segments(run)
    blocks = _block_errors(run, distilled)
    results = {
        row: SeedResult(
            planned.label,
            message,
            _merged(_numbers(records.pop(row, {})), errors.scores(model)),
            size.get("transformer_bytes"),
            size.get("compression"),
            round(sum(record.seconds for record in distilled), 3),
            blocks,
            tuple(dict.fromkeys(record.device for record in distilled)),
            errors.velocity_errors.get(model, {}),
            errors.latent_errors.get(model, {}),
            errors.step_weights,
            errors.decision_steps,
            errors.scores(NOISE_FLOOR_MODEL),
        )
        for model, row in models.items()
    }
    return results, records


def _result(run: Run, unit: str) -> Mapping[str, Any] | None:
    """Result of a unit of the evaluation; None where it is not done."""
    record = run.records.read(Evaluation.name, unit)
    return None if record is None else record.result


def _segments(run: Run) -> list[UnitRecord]:
    """Records of the distillation units that hold blocks, those of the first transformer."""
    method, role = run.context.methods[0].name, run.context.model.roles[0]
    names = [part_name(method, role, part) for part, blocks in parts(run) if blocks]
    return [record for name in names if (record := run.records.read("distillation", name)) is not None]


def _block_errors(run: Run, segments: Sequence[UnitRecord]) -> BlockErrors | None:
    """None where no loss was measured. A block of which nothing is rounded has no error, and no decibels."""
    losses = {
        block: summary["loss_after"]
        for record in segments
        for block, summary in record.result["blocks"].items()
        if summary["loss_after"]
    }
    if not losses:
        return None
    recipe = run.context.methods[0].recipe
    records = require_all(run, "activations", [sample.name for sample in selected_samples(run)])
    basis = {
        "activations": [record.fingerprint for record in records],
        "lambda_min": recipe.lambda_min if recipe.token_weights else None,
        "attention": recipe.sparse.calibrate if recipe.sparse is not None else None,
    }
    return BlockErrors(losses, fingerprint(basis))


def _numbers(records: Mapping[str, UnitRecord]) -> dict[str, dict[str, float]]:
    return {
        prompt: {key: value for key, value in record.result.items() if isinstance(value, bool | int | float)}
        for prompt, record in records.items()
    }


def _merged(*found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Numbers by prompt of several sources."""
    merged: dict[str, dict[str, float]] = {}
    for numbers in found:
        for prompt, values in numbers.items():
            merged.setdefault(prompt, {}).update(values)
    return merged


def _numbers_by_seed(seeds: Mapping[int, Mapping[str, UnitRecord]]) -> dict[int, Prompts]:
    return {seed: _numbers(found) for seed, found in seeds.items() if found}
