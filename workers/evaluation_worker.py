"""Generates held-out prompts with one of the models, and compares with the full-precision video of the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from imageio.v3 import imwrite
from torch import Tensor

import reelquant  # noqa: F401  (registers the checkpoint format with diffusers)
from reelquant.attention.sparse_attention import Visited
from storage.manifest import OutputFile
from storage.run_directory import EVALUATION, RunDirectory
from workers.fidelity import fidelity
from workers.generation import generate
from workers.kept_pipeline import full_precision, let_go
from workers.messages import EvaluationSettings, EvaluationUnit, Progress, UnitOutput
from workers.model_source import open_pipeline
from workers.out_of_memory import GENERATION_ADVICE, SHARDING_ADVICE
from workers.perceptual import PerceptualDistance
from workers.process import device_name, peak_memory_bytes, prepare_process, unit_seed
from workers.recognition import DigitRecognizer

OTHER_ATTENTION = "_native_math"
"""diffusers' name of the attention backend of the noise floor: plain matrix products and softmax. It holds the scores of all
pairs of tokens, so it is for models and videos whose tokens number some thousands."""


class EvaluationWorker:
    """Holds the pipeline it used last; its unit is one prompt with one model, or the noise floor of one prompt.

    Writes the array `evaluation/<unit>/video` `[F, H, W, 3]` uint8, from which metrics are taken, and
    `evaluation/<unit>.mp4` for people, if the settings have films. Metrics are those of 8-bit frames.
    """

    BESIDE_KEPT_PIPELINE = True
    MEMORY_ADVICE = SHARDING_ADVICE + GENERATION_ADVICE

    def __init__(self, settings: EvaluationSettings) -> None:
        self._settings = settings
        self._device, self._dtype = prepare_process(settings.source.numerics)
        self._run = RunDirectory(settings.source.run)
        self._store = self._run.calibration_store
        self._opened: tuple[Path, torch.dtype, Any] | None = None
        """The checkpoint that was used last."""
        self._recognizer = DigitRecognizer(settings.recognizer) if settings.recognizer else None
        self._lpips = PerceptualDistance.available()

    def run(self, unit: EvaluationUnit, progress: Progress) -> UnitOutput:
        """Generates, stores, measures."""
        if unit.noise_floor:
            return self._noise_floor(unit, progress)
        folder = (
            self._settings.source.model if unit.checkpoint is None else self._run.store.local_folder(unit.checkpoint)
        )
        pipeline = self._pipeline(folder, self._dtype)
        sparse = getattr(pipeline.transformer, "sparse_attention", None)
        if sparse is not None:
            sparse.visited = Visited()
        generated = generate(
            pipeline, unit.prompt.prompt, self._settings.generation, seed=self._seed(unit), progress=progress
        )
        outputs = (
            *self._store.write(f"evaluation/{unit.name}/video", generated.video),
            *([self._film(unit, generated.video)] if self._settings.films else []),
        )
        video = generated.video.float() / 255
        steps = sorted(generated.step_seconds)
        result: dict[str, Any] = {"prompt": unit.prompt.prompt, "seconds_per_step": steps[len(steps) // 2]}
        if sparse is not None:
            result["effective_density"] = sparse.visited.density
        if self._recognizer is not None:
            result["recognized"] = self._recognizer.recognized(video, unit.prompt.prompt)
        if unit.checkpoint is not None:
            reference = self._store.read(f"evaluation/full_precision-{unit.prompt.name}/video").float() / 255
            result.update(fidelity(reference, video, self._lpips))
        return UnitOutput(tuple(outputs), result, device_name(self._device), peak_memory_bytes(self._device))

    def shadow(self, unit: EvaluationUnit, progress: Progress) -> None:
        """Takes part in the forward passes of a replica's unit of the full-precision model, and keeps nothing."""
        pipeline = self._pipeline(self._settings.source.model, torch.bfloat16 if unit.noise_floor else self._dtype)
        for _ in range(2 if unit.noise_floor else 1):
            generate(
                pipeline,
                unit.prompt.prompt,
                self._settings.generation,
                seed=self._seed(unit),
                progress=progress,
                decode=False,
            )

    def _seed(self, unit: EvaluationUnit) -> int:
        return unit_seed(self._settings.source.seed, "evaluation", unit.prompt.name)

    def _noise_floor(self, unit: EvaluationUnit, progress: Progress) -> UnitOutput:
        """Full precision in bfloat16 with the default attention and with another one, from the same noise; no files."""
        pipeline = self._pipeline(self._settings.source.model, torch.bfloat16)

        def video(begun: int) -> Tensor:
            generated = generate(
                pipeline,
                unit.prompt.prompt,
                self._settings.generation,
                seed=self._seed(unit),
                progress=lambda done, total: progress(begun * total + done, 2 * total),
            )
            return generated.video.float() / 255

        default = video(0)
        # Not `set_attention_backend`: what that sets stays set for every later pipeline of the process.
        with attention_backend(OTHER_ATTENTION):
            other = video(1)
        result: dict[str, Any] = {"prompt": unit.prompt.prompt, **fidelity(default, other, self._lpips)}
        return UnitOutput((), result, device_name(self._device), peak_memory_bytes(self._device))

    def _film(self, unit: EvaluationUnit, video: Tensor) -> OutputFile:
        fps = self._settings.film_fps
        film = imwrite("<bytes>", video.numpy(), extension=".mp4", plugin="pyav", codec="libx264", fps=fps)
        assert isinstance(film, bytes)
        return self._run.store.put(f"{EVALUATION}/{unit.name}.mp4", film)

    def _pipeline(self, folder: Path, dtype: torch.dtype) -> Any:
        if folder == self._settings.source.model:
            self._opened = None
            sharding, variant = self._settings.sharding, self._settings.source.variant
            return full_precision(folder, device=self._device, dtype=dtype, sharding=sharding, variant=variant)
        if self._opened is None or self._opened[:2] != (folder, dtype):
            self._opened = None
            let_go()
            self._opened = (folder, dtype, open_pipeline(folder, device=self._device, dtype=dtype))
        return self._opened[2]
