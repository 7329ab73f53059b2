"""Held-out prompts: the full-precision model (and, if asked for, the noise floor), then every checkpoint, same seeds."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from pipeline.context import Run
from pipeline.run_units import FULL_PRECISION, NOISE_FLOOR, evaluated_models, evaluation_name
from pipeline.stages.assembly import checkpoint_path
from pipeline.stages.stage import StageUnit, UnitPlan, require, unit
from storage.manifest import fingerprint
from workers.evaluation_worker import OTHER_ATTENTION, EvaluationWorker
from workers.messages import EvaluationSettings, EvaluationUnit, PromptUnit


class Evaluation:
    """One unit a model and prompt."""

    name, title = "evaluation", "Evaluation"
    worker_class = EvaluationWorker

    def settings(self, run: Run) -> EvaluationSettings:
        """Of every worker."""
        context = run.context
        recognizer = context.config.evaluation.recognizer
        return EvaluationSettings(
            context.source,
            context.generation,
            None if recognizer is None else recognizer.resolve(),
            context.config.evaluation.films,
            context.sharding,
            context.config.evaluation.film_fps,
        )

    def plan(self, run: Run) -> list[UnitPlan]:
        """The full-precision videos depend on nothing, a method's on its checkpoint and on the former."""
        return [
            UnitPlan(evaluation_name(model, prompt.name), partial(self._of_model, run, prompt, model))
            for model in evaluated_models(run.context.config)
            for prompt in run.context.held_out_prompts
        ]

    def _of_model(self, run: Run, prompt: PromptUnit, model: str) -> StageUnit:
        if model == FULL_PRECISION:
            return self._unit(run, prompt, model, None, "")
        if model == NOISE_FLOOR:
            return self._noise_floor(run, prompt)
        return self._compared(run, prompt, model)

    def _compared(self, run: Run, prompt: PromptUnit, method: str) -> StageUnit:
        assembled = require(run, "assembly", method).fingerprint
        reference = require(run, self.name, evaluation_name(FULL_PRECISION, prompt.name)).fingerprint
        upstream = fingerprint({"assembly": assembled, "reference": reference})
        return self._unit(run, prompt, method, checkpoint_path(run, method), upstream)

    def _unit(self, run: Run, prompt: PromptUnit, model: str, checkpoint: str | None, upstream: str) -> StageUnit:
        settings = self.settings(run)
        name = evaluation_name(model, prompt.name)
        depends = {
            **run.context.base_fingerprint(),
            "generation": asdict(settings.generation),
            "recognizer": run.context.recognizer_fingerprint,
            "films": settings.film_fps if settings.films else None,
            "prompt": prompt.prompt,
            "upstream": upstream,
        }
        payload = EvaluationUnit(name, prompt, checkpoint)
        return unit(self.name, name, payload, depends, affinity=model, shared=checkpoint is None)

    def _noise_floor(self, run: Run, prompt: PromptUnit) -> StageUnit:
        name = evaluation_name(NOISE_FLOOR, prompt.name)
        depends = {
            **run.context.base_fingerprint(),
            "generation": asdict(self.settings(run).generation),
            "prompt": prompt.prompt,
            "other_attention": OTHER_ATTENTION,
        }
        payload = EvaluationUnit(name, prompt, None, noise_floor=True)
        return unit(self.name, name, payload, depends, affinity=NOISE_FLOOR, shared=True)
