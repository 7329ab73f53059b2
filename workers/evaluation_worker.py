"""Generates held-out prompts with one of the models, and compares with the full-precision video of the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from imageio.v3 import imwrite
from torch import Tensor

import reelquant  # noqa: F401  (registers the checkpoint format with diffusers)
from reelquant.runtime.sparse_attention import SparseAttention, Visited
from storage.unit_store import UnitStore
from workers.checkpoint_settings import apply_settings
from workers.fidelity import fidelity
from workers.generation import generate
from workers.hub_snapshot import model_folder
from workers.kept_pipeline import full_precision, let_go
from workers.messages import (
    FILM,
    EvaluationSettings,
    EvaluationUnit,
    Progress,
    PromptUnit,
    StepWeightsUnit,
    UnitOutput,
    VelocityUnit,
)
from workers.model_source import family_of_model, open_pipeline
from workers.out_of_memory import GENERATION_ADVICE, SHARDING_ADVICE
from workers.perceptual import PerceptualDistance
from workers.process import device_name, peak_memory_bytes, prepare_process, unit_seed
from workers.recognition import DigitRecognizer
from workers.step_effects import Trajectory, interpolated, rounding_errors, step_effects
from workers.velocity_pass import Velocities, latent_errors, velocity_errors
from workers.velocity_watch import transformers

OTHER_ATTENTION = "_native_math"
"""diffusers' name of the attention backend of the noise floor: plain matrix products and softmax. It holds the scores of all
pairs of tokens, so it is for models and videos whose tokens number some thousands."""


class EvaluationWorker:
    """Holds the pipeline it used last. Its units:

    | unit | does | result |
    |---|---|---|
    | `EvaluationUnit` | one prompt with one model, or the noise floor of one prompt | metrics of the video |
    | `VelocityUnit` | one model on the stored trajectories of some prompts | errors of its velocities |
    | `StepWeightsUnit` | perturbed roll-outs of the full-precision model | weights of the steps |

    The first writes the array `evaluation/<unit>/video` `[F, H, W, 3]` uint8, from which metrics are taken, and
    `evaluation/<unit>/film.mp4` for people, if the settings have films; of the full-precision model also its trajectory
    (`workers.velocity_pass`), if the unit says so. Metrics are those of 8-bit frames.
    """

    BESIDE_KEPT_PIPELINE = True
    MEMORY_ADVICE = SHARDING_ADVICE + GENERATION_ADVICE

    def __init__(self, settings: EvaluationSettings) -> None:
        self._settings = settings
        self._device, self._dtype = prepare_process(settings.source.numerics)
        self._model = model_folder(settings.source.model)
        self._opened: tuple[Path, torch.dtype, Any] | None = None
        """The checkpoint that was used last."""
        self._recognizer = DigitRecognizer(settings.recognizer) if settings.recognizer else None
        self._lpips = PerceptualDistance.available()

    def run(
        self, unit: EvaluationUnit | VelocityUnit | StepWeightsUnit, progress: Progress, store: UnitStore
    ) -> UnitOutput:
        """Generates, stores, measures."""
        self._store = store
        if isinstance(unit, VelocityUnit):
            return self._output(self._velocity(unit, progress))
        if isinstance(unit, StepWeightsUnit):
            return self._output(self._step_weights(unit, progress))
        if unit.noise_floor:
            return self._output(self._noise_floor(unit, progress))
        return self._video(unit, progress)

    def _video(self, unit: EvaluationUnit, progress: Progress) -> UnitOutput:
        folder = self._model if unit.checkpoint is None else self._store.checkpoint(unit.checkpoint)
        pipeline = self._pipeline(folder, self._dtype)
        if unit.checkpoint is not None:
            apply_settings(pipeline, unit.knobs)
        sparse = _counted(pipeline)
        velocities, name = Velocities(), f"evaluation/{unit.name}"
        with velocities.kept(pipeline) if unit.keep_velocity else nullcontext():
            generated = generate(
                pipeline, unit.prompt, self._settings.generation, seed=self._seed(unit.prompt), progress=progress
            )
        self._store.write(f"{name}/video", generated.video)
        if self._settings.films:
            self._film(f"{name}/{FILM}", generated.video)
        video = generated.video.float() / 255
        steps = sorted(generated.step_seconds)
        result: dict[str, Any] = {"prompt": unit.prompt.prompt, "seconds_per_step": steps[len(steps) // 2]}
        result |= _density(sparse)
        if unit.keep_latents:
            self._store.write(f"{name}/latents", torch.stack(generated.latents))
        if unit.keep_velocity:
            velocities.write(self._store, name)
            result["denoised_changes"] = velocities.denoised_changes(pipeline, generated.latents)
        if self._recognizer is not None:
            result["recognized"] = self._recognizer.recognized(video, unit.prompt.prompt)
        if unit.reference is not None:
            reference = self._store.read(f"{unit.reference}/video").float() / 255
            result.update(fidelity(reference, video, self._lpips))
            if unit.compare_latents:
                result["latent_error"] = latent_errors(self._store, unit.reference, generated.latents)
        return self._output(result)

    def shadow(
        self, unit: EvaluationUnit | VelocityUnit | StepWeightsUnit, progress: Progress, store: UnitStore
    ) -> None:
        """Takes part in the forward passes of a replica's unit of the full-precision model, and keeps nothing."""
        self._store = store
        if isinstance(unit, VelocityUnit):
            self._velocity(unit, progress)
            return
        if isinstance(unit, StepWeightsUnit):
            self._step_weights(unit, progress)
            return
        pipeline = self._pipeline(self._model, torch.bfloat16 if unit.noise_floor else self._dtype)
        for _ in range(2 if unit.noise_floor else 1):
            generate(
                pipeline,
                unit.prompt,
                self._settings.generation,
                seed=self._seed(unit.prompt),
                progress=progress,
                decode=False,
            )

    def _seed(self, prompt: PromptUnit) -> int:
        return unit_seed(self._settings.seed, "evaluation", prompt.name)

    def _velocity(self, unit: VelocityUnit, progress: Progress) -> dict[str, Any]:
        """Errors of the velocities by prompt, and the effective density of a sparse model."""
        if unit.checkpoint is None:
            pipeline = self._pipeline(self._model, torch.bfloat16)
        else:
            pipeline = self._pipeline(self._store.checkpoint(unit.checkpoint), self._dtype)
            apply_settings(pipeline, unit.knobs)
        sparse = _counted(pipeline)
        with attention_backend(OTHER_ATTENTION) if unit.checkpoint is None else nullcontext():
            errors = velocity_errors(
                pipeline,
                unit.prompts,
                self._settings.generation,
                store=self._store,
                names=unit.trajectories,
                seeds=[self._seed(prompt) for prompt in unit.prompts],
                progress=progress,
            )
        return {"prompts": errors, **_density(sparse)}

    def _step_weights(self, unit: StepWeightsUnit, progress: Progress) -> dict[str, Any]:
        """`weights` of all steps, and the `effects` that they are interpolated from, the mean over prompts."""
        pipeline = self._pipeline(self._model, self._dtype)
        family, generation = family_of_model(self._model), self._settings.generation
        # ZeRO-3 follows the order in which modules run: a pass without its blocks would mislead it.
        leave_out = self._settings.sharding.sharding != "deepspeed"
        total, found = len(unit.prompts), []
        for index, (prompt, name) in enumerate(zip(unit.prompts, unit.trajectories, strict=True)):

            def report(done: int, of: int, index: int = index) -> None:
                progress(index * of + done, total * of)

            latents, velocity = (self._store.read(f"{name}/{array}") for array in ("latents", "velocity"))
            trajectory = Trajectory(prompt, latents, velocity, self._seed(prompt))
            errors = rounding_errors(
                pipeline, family, trajectory, generation, steps=unit.steps, leave_out=leave_out, progress=report
            )
            own = step_effects(
                pipeline, family, trajectory, generation,
                errors=errors, rows=unit.rows, leave_out=leave_out, progress=report,
            )  # fmt: skip
            found.append(own)
        effects = {step: sum(own[step] for own in found) / total for step in unit.steps}
        weights = interpolated(effects, generation.num_inference_steps)
        return {"weights": weights, "effects": [[step, effect] for step, effect in effects.items()]}

    def _output(self, result: dict[str, Any]) -> UnitOutput:
        return UnitOutput(result, device_name(self._device), peak_memory_bytes(self._device))

    def _noise_floor(self, unit: EvaluationUnit, progress: Progress) -> dict[str, Any]:
        """Full precision in bfloat16 with the default attention and with another one, from the same noise; no files."""
        pipeline = self._pipeline(self._model, torch.bfloat16)

        def video(begun: int) -> Tensor:
            generated = generate(
                pipeline,
                unit.prompt,
                self._settings.generation,
                seed=self._seed(unit.prompt),
                progress=lambda done, total: progress(begun * total + done, 2 * total),
            )
            return generated.video.float() / 255

        default = video(0)
        # Not `set_attention_backend`: what that sets stays set for every later pipeline of the process.
        with attention_backend(OTHER_ATTENTION):
            other = video(1)
        return {"prompt": unit.prompt.prompt, **fidelity(default, other, self._lpips)}

    def _film(self, name: str, video: Tensor) -> None:
        fps = self._settings.film_fps
        film = imwrite("<bytes>", video.numpy(), extension=".mp4", plugin="pyav", codec="libx264", fps=fps)
        assert isinstance(film, bytes)
        self._store.write_file(name, lambda path: path.write_bytes(film))

    def _pipeline(self, folder: Path, dtype: torch.dtype) -> Any:
        if folder == self._model:
            self._opened = None
            sharding, variant = self._settings.sharding, self._settings.source.variant
            return full_precision(folder, device=self._device, dtype=dtype, sharding=sharding, variant=variant)
        if self._opened is None or self._opened[:2] != (folder, dtype):
            self._opened = None
            let_go()
            self._opened = (folder, dtype, open_pipeline(folder, device=self._device, dtype=dtype))
        return self._opened[2]


def _counted(pipeline: Any) -> list[SparseAttention]:
    """The sparse attention of a pipeline's transformers, its count of visited pairs at nothing."""
    sparse = [model.sparse_attention for model in transformers(pipeline) if hasattr(model, "sparse_attention")]
    for attention in sparse:
        attention.visited = Visited()
    return sparse


def _density(sparse: Sequence[SparseAttention]) -> dict[str, float]:
    """The effective density of a generation; nothing where attention is dense."""
    if not sparse:
        return {}
    return {"effective_density": sum((attention.visited for attention in sparse), Visited()).density}
