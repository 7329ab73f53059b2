"""Names and numbers of the units that a configuration asks for.

| stage | units | known |
|---|---|---|
| trajectories | one a calibration prompt | from the configuration |
| selection | one | from the configuration |
| activations | one a chosen sample, if a method reads activations | their number at once, their names after the selection |
| distillation | by method and transformer: its segments, and one for its linears outside the blocks | from the model's blocks |
| refinement | one a transformer and method that asks for it | from the model |
| assembly | one a method | from the configuration |
| evaluation | one a prompt and model: full precision, noise floor if asked for, methods, settings | from the configuration |
| the same, teacher-forced | one for the weights of the steps; one a model and group of prompts | from the configuration |

The driver's stages build their units from these names, and list them in the run's `units.json`, which `status` and the report
read. Imports no torch.
"""

from __future__ import annotations

from pipeline.config.schema import RunConfig

STAGES = ("trajectories", "selection", "activations", "distillation", "refinement", "assembly", "evaluation")
"""In the order of the pipeline."""
SELECTION = "selection"
"""Name of the selection's unit."""
FULL_PRECISION = "full_precision"
"""Name of the 16-bit model among the models of the evaluation."""
NOISE_FLOOR = "noise_floor"
"""Name of the full-precision model in bfloat16 that is compared with itself under another attention backend."""
STEP_WEIGHTS = "step_weights"
"""Name of the unit that measures how much every step's error weighs."""
AUXILIARY = "auxiliary"
"""Name of a method's part that lies outside the blocks."""


def num_units(config: RunConfig, *, num_segments: int | None = None, num_roles: int = 1) -> dict[str, int | None]:
    """Units of every stage of a run.

    Args:
        num_segments: segments of one transformer; None where the model's blocks are not known, nor then the distillation's
            units.
        num_roles: transformers of the pipeline.
    """
    methods = len(config.methods)
    return {
        "trajectories": config.prompts.num_calibration,
        "selection": 1,
        "activations": num_roles * config.selection.num_samples if reads_activations(config) else 0,
        "distillation": None if num_segments is None else methods * num_roles * len(part_names(num_segments)),
        "refinement": num_roles * len(refined_methods(config)),
        "assembly": methods,
        "evaluation": len(evaluation_names(config)),
    }


def prompt_names(num: int) -> list[str]:
    """Names of the first `num` prompts of a file."""
    return [f"prompt-{index:03d}" for index in range(num)]


def sample_name(prompt: str, step: int) -> str:
    """Name of a candidate: one denoising step of one calibration prompt."""
    return f"{prompt}-step-{step:03d}"


def part_names(num_segments: int) -> list[str]:
    """Names of the parts of one transformer's distillation by one method."""
    return [*(f"segment-{index:03d}" for index in range(num_segments)), AUXILIARY]


def role_name(method: str, role: str) -> str:
    """Name of what a method makes of one transformer: the method's own for the first, or only, one."""
    return method if role == "transformer" else f"{method}-{role}"


def part_name(method: str, role: str, part: str) -> str:
    """Name of the unit that distills one part of a transformer by a method."""
    return f"{role_name(method, role)}-{part}"


def evaluation_name(model: str, prompt: str) -> str:
    """Name of the unit that evaluates a model on a held-out prompt."""
    return f"{model}-{prompt}"


def velocity_name(model: str, group: int) -> str:
    """Name of the unit with a model's teacher-forced passes over a group of prompts."""
    return f"{model}-velocity-{group:03d}"


def evaluation_names(config: RunConfig) -> list[str]:
    """Names of all units of the evaluation."""
    prompts, models = prompt_names(config.prompts.num_held_out), evaluated_models(config)
    names = [evaluation_name(model, prompt) for model in models for prompt in prompts[: num_videos(config, model)]]
    groups = range(len(velocity_groups(config)))
    weights = [STEP_WEIGHTS] if groups else []
    return names + weights + [velocity_name(model, group) for model in velocity_models(config) for group in groups]


def num_videos(config: RunConfig, model: str) -> int:
    """Held-out prompts of which a model generates videos, from the top."""
    held_out, given = config.prompts.num_held_out, config.evaluation.videos
    return held_out if given is None or model == FULL_PRECISION else given


def velocity_groups(config: RunConfig) -> list[list[str]]:
    """Names of the prompts with teacher-forced passes, those together that go through the pipeline in one call."""
    names, size = prompt_names(config.num_velocity_prompts), config.evaluation.prompts_per_pass
    return [names[first : first + size] for first in range(0, len(names), size)]


def velocity_models(config: RunConfig) -> tuple[str, ...]:
    """Models with teacher-forced passes: all that are evaluated but the one that the trajectories are of."""
    return tuple(model for model in evaluated_models(config) if model != FULL_PRECISION)


def reads_activations(config: RunConfig) -> bool:
    """Whether the stage activations has units."""
    return any(method.drift_repair or method.needs_activations for method in config.methods)


def refined_methods(config: RunConfig) -> tuple[str, ...]:
    """Names of the methods that have a unit in the stage refinement."""
    return tuple(m.name for m in config.methods if m.is_refined)


def evaluated_models(config: RunConfig) -> tuple[str, ...]:
    """Models that generate the held-out prompts, in the order of the evaluation; settings come by name, as a stored
    configuration has them."""
    floor = (NOISE_FLOOR,) if config.evaluation.noise_floor else ()
    return (FULL_PRECISION, *floor, *(method.name for method in config.methods), *sorted(config.evaluation.settings))


def method_of(config: RunConfig, model: str) -> str:
    """Name of the method whose checkpoint an evaluated model is; a setting's is that of the run's `method`."""
    return config.method.name if model in config.evaluation.settings else model
