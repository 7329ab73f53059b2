"""Whether a finished checkpoint can have the settings with which it is to be evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.model_facts import ModelFacts
from reelquant.runtime.knobs import changed
from reelquant.settings.recipe import RESERVED_NAMES
from workers.messages import MethodPlan


def setting_problems(config: RunConfig, plan: MethodPlan, model: ModelFacts) -> list[str]:
    """Settings of the evaluation that the checkpoint of the run's method cannot have."""
    problems, sparse = [], plan.recipe.sparse
    taken = {method.name for method in config.methods} & set(config.evaluation.settings)
    problems += [f"evaluation.settings.{name}: a method has that name; take another one" for name in sorted(taken)]
    kept = RESERVED_NAMES & set(config.evaluation.settings)
    problems += [
        f"evaluation.settings.{name}: the evaluation has a model of that name; take another one"
        for name in sorted(kept)
    ]
    for name, setting in config.evaluation.settings.items():
        knobs, found = setting.knobs(), []
        if knobs.pop("step_protection", None) is not None and plan.protection is None:
            found.append(f"step_protection is given, but method {plan.name} has protected_steps 0")
        if sparse is not None:
            knobs.pop("enabled", None)
        if knobs and sparse is None:
            found.append(f"{', '.join(knobs)}: method {plan.name} has dense attention (attention.density 1)")
        elif sparse is not None:
            found += _knob_problems(knobs, plan, model, config.generation.num_inference_steps)
        problems += [f"evaluation.settings.{name}: {problem}" for problem in found]
    return problems


def _knob_problems(knobs: Mapping[str, Any], plan: MethodPlan, model: ModelFacts, num_steps: int) -> list[str]:
    spec = plan.attention
    # What the calibration measures is not known yet, but that it will be there.
    if plan.recipe.attention.calibrates_gain:
        spec = replace(spec, residual=replace(spec.residual, gain=(1.0,)))
    try:
        found = changed(spec, knobs, schedule=model.noise_levels, num_steps=num_steps)
    except ValueError as error:
        return [str(error).removeprefix("sparse_attention: ")]
    return found.residual.problems(model.family.num_heads(model.config)[1])
