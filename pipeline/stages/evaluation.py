"""Held-out prompts: the full-precision model (and, if asked for, the noise floor), then every checkpoint, same seeds; and
teacher-forced passes of the checkpoints over what the full-precision model has made of some of them.

| unit | waits for |
|---|---|
| full precision, noise floor: a prompt | - |
| weights of the steps | full precision of the prompts that it perturbs |
| noise floor, teacher-forced: a group of prompts | full precision of the group |
| method or setting: a prompt | its checkpoint, full precision of the prompt |
| the same, teacher-forced: a group of prompts | its checkpoint, full precision of the group |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from pipeline.context import Run
from pipeline.run_units import (
    FULL_PRECISION,
    NOISE_FLOOR,
    STEP_WEIGHTS,
    evaluated_models,
    evaluation_name,
    method_of,
    num_videos,
    velocity_groups,
    velocity_models,
    velocity_name,
)
from pipeline.stages.stage import StageUnit, UnitPlan, require, require_all, unit
from storage.cache import fingerprint
from workers.evaluation_worker import OTHER_ATTENTION, EvaluationWorker
from workers.messages import EvaluationSettings, EvaluationUnit, PromptUnit, StepWeightsUnit, VelocityUnit
from workers.rounded_outputs import BITS
from workers.step_effects import PERTURBATION, spread_steps


class Evaluation:
    """One unit a model and prompt; with teacher-forced passes one for the weights of the steps, and one a model and group."""

    name, title = "evaluation", "Evaluation"
    worker_class = EvaluationWorker

    def settings(self, run: Run) -> EvaluationSettings:
        """Of every worker."""
        context = run.context
        recognizer = context.config.evaluation.recognizer
        return EvaluationSettings(
            context.source,
            context.config.generation,
            None if recognizer is None else recognizer.resolve(),
            context.config.evaluation.films,
            context.sharding,
            context.config.evaluation.film_fps or context.model.family.frames_per_second,
            context.config.evaluation_seed,
        )

    def plan(self, run: Run) -> list[UnitPlan]:
        """The full-precision videos depend on nothing, a method's on its checkpoint and on the former."""
        config = run.context.config
        plans = [
            UnitPlan(evaluation_name(model, prompt.name), partial(self._of_model, run, prompt, model))
            for model in evaluated_models(config)
            for prompt in run.context.held_out_prompts[: num_videos(config, model)]
        ]
        groups = velocity_groups(config)
        if groups:
            plans.append(UnitPlan(STEP_WEIGHTS, partial(self._step_weights, run)))
        return plans + [
            UnitPlan(velocity_name(model, index), partial(self._velocity, run, model, index, group))
            for model in velocity_models(config)
            for index, group in enumerate(groups)
        ]

    def _of_model(self, run: Run, prompt: PromptUnit, model: str) -> StageUnit:
        if model == FULL_PRECISION:
            return self._full_precision(run, prompt)
        if model == NOISE_FLOOR:
            return self._noise_floor(run, prompt)
        return self._compared(run, prompt, model)

    def _full_precision(self, run: Run, prompt: PromptUnit) -> StageUnit:
        name, num = evaluation_name(FULL_PRECISION, prompt.name), run.context.config.num_velocity_prompts
        measured = prompt in run.context.held_out_prompts[:num]
        payload = EvaluationUnit(name, prompt, None, keep_latents=num > 0, keep_velocity=measured)
        depends = {"keeps": [payload.keep_latents, payload.keep_velocity], "upstream": ""}
        return self._video(run, payload, FULL_PRECISION, depends)

    def _compared(self, run: Run, prompt: PromptUnit, model: str) -> StageUnit:
        method, knobs = _checkpoint_of(run, model)
        assembled = require(run, "assembly", method).fingerprint
        reference = evaluation_name(FULL_PRECISION, prompt.name)
        upstream = {"assembly": assembled, "reference": require(run, self.name, reference).fingerprint}
        payload = EvaluationUnit(
            evaluation_name(model, prompt.name),
            prompt,
            f"assembly/{method}",
            model if model != method else None,
            knobs,
            reference=f"{self.name}/{reference}",
            compare_latents=run.context.config.num_velocity_prompts > 0,
        )
        return self._video(run, payload, method, {"upstream": fingerprint(upstream), **_covered(knobs)})

    def _video(self, run: Run, payload: EvaluationUnit, model: str, depends: dict[str, Any]) -> StageUnit:
        settings = self.settings(run)
        covered = {
            **run.context.evaluation_fingerprint(),
            "generation": asdict(settings.generation),
            "recognizer": run.context.recognizer_fingerprint,
            "films": settings.film_fps if settings.films else None,
            **payload.prompt.to_dict(),
            **depends,
        }
        return unit(self.name, payload.name, payload, covered, affinity=model, shared=payload.checkpoint is None)

    def _noise_floor(self, run: Run, prompt: PromptUnit) -> StageUnit:
        name = evaluation_name(NOISE_FLOOR, prompt.name)
        depends = {
            **run.context.evaluation_fingerprint(),
            "generation": asdict(self.settings(run).generation),
            **prompt.to_dict(),
            "other_attention": OTHER_ATTENTION,
        }
        payload = EvaluationUnit(name, prompt, None, noise_floor=True)
        return unit(self.name, name, payload, depends, affinity=NOISE_FLOOR, shared=True)

    def _step_weights(self, run: Run) -> StageUnit:
        config = run.context.config
        num_steps = config.generation.num_inference_steps
        prompts = run.context.held_out_prompts[: config.evaluation.weight_prompts]
        steps = spread_steps(config.num_weight_steps, num_steps)
        payload = StepWeightsUnit(
            STEP_WEIGHTS, prompts, _trajectories(prompts), steps, config.evaluation.prompts_per_pass
        )
        depends = {
            **run.context.evaluation_fingerprint(),
            "trajectories": self._references(run, prompts),
            "steps": list(steps),
            "rows": payload.rows,
            "perturbation": [PERTURBATION, BITS],
        }
        return unit(self.name, payload.name, payload, depends, affinity=FULL_PRECISION, shared=True)

    def _velocity(self, run: Run, model: str, index: int, group: Sequence[str]) -> StageUnit:
        prompts = tuple(prompt for prompt in run.context.held_out_prompts if prompt.name in group)
        method, knobs = _checkpoint_of(run, model)
        checkpoint = None if model == NOISE_FLOOR else f"assembly/{method}"
        # The noise floor's other attention stands in place of a checkpoint.
        of = OTHER_ATTENTION if checkpoint is None else require(run, "assembly", method).fingerprint
        payload = VelocityUnit(velocity_name(model, index), prompts, _trajectories(prompts), checkpoint, knobs)
        depends = {
            **run.context.evaluation_fingerprint(),
            "model_of": of,
            "trajectories": self._references(run, prompts),
            **_covered(knobs),
        }
        return unit(self.name, payload.name, payload, depends, affinity=method, shared=checkpoint is None)

    def _references(self, run: Run, prompts: Sequence[PromptUnit]) -> list[str]:
        names = [evaluation_name(FULL_PRECISION, prompt.name) for prompt in prompts]
        return [record.fingerprint for record in require_all(run, self.name, names)]


def _checkpoint_of(run: Run, model: str) -> tuple[str, dict[str, Any]]:
    """The method whose checkpoint a model is, and what of its settings is changed."""
    config = run.context.config
    setting = config.evaluation.settings.get(model)
    return method_of(config, model), {} if setting is None else setting.knobs()


def _covered(knobs: Mapping[str, Any]) -> dict[str, Any]:
    return {"knobs": dict(knobs)} if knobs else {}


def _trajectories(prompts: Sequence[PromptUnit]) -> tuple[str, ...]:
    """Units with the full-precision trajectories."""
    return tuple(f"evaluation/{evaluation_name(FULL_PRECISION, prompt.name)}" for prompt in prompts)
