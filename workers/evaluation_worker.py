"""Generates held-out prompts with one of the models, and compares with the full-precision video of the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from imageio.v3 import imwrite
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

import reelquant  # noqa: F401  (registers the checkpoint format with diffusers)
from reelquant.calibration.block_rounding import EXACT_DB
from reelquant.metrics import psnr_db
from storage.atomic_files import create_directory, write_bytes_atomic
from storage.manifest import OutputFile
from storage.run_directory import RunDirectory
from workers.generation import generate
from workers.messages import EvaluationSettings, EvaluationUnit, Progress, UnitOutput
from workers.model_source import open_pipeline
from workers.perceptual import PerceptualDistance
from workers.process import device_name, peak_memory_bytes, prepare_process, unit_seed
from workers.recognition import DigitRecognizer

FRAMES_PER_SECOND = 15
"""Of the films; the models say nothing about it."""


class EvaluationWorker:
    """Holds the pipeline it used last; its unit is one prompt with one model.

    Writes the array `evaluation/<unit>/video` `[F, H, W, 3]` uint8, from which metrics are taken, and
    `evaluation/<unit>.mp4` for people. Metrics are those of 8-bit frames.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self._settings = settings
        self._device, self._dtype = prepare_process(settings.source.numerics)
        self._run = RunDirectory(settings.source.run)
        self._store = self._run.calibration_store
        self._opened: tuple[Path, Any] | None = None
        self._recognizer = DigitRecognizer(settings.recognizer) if settings.recognizer else None
        self._lpips = PerceptualDistance.available()

    def run(self, unit: EvaluationUnit, progress: Progress) -> UnitOutput:
        """Generates, stores, measures."""
        folder = self._settings.source.model if unit.checkpoint is None else self._run.path / unit.checkpoint
        seed = unit_seed(self._settings.source.seed, "evaluation", unit.prompt.name)
        generated = generate(
            self._pipeline(folder), unit.prompt.prompt, self._settings.generation, seed=seed, progress=progress
        )
        outputs = (
            *self._store.write(f"evaluation/{unit.name}/video", generated.video),
            self._film(unit, generated.video),
        )
        video = generated.video.float() / 255
        steps = sorted(generated.step_seconds)
        result: dict[str, Any] = {"prompt": unit.prompt.prompt, "seconds_per_step": steps[len(steps) // 2]}
        if self._recognizer is not None:
            result["recognized"] = self._recognizer.recognized(video, unit.prompt.prompt)
        if unit.checkpoint is not None:
            reference = self._store.read(f"evaluation/full_precision-{unit.prompt.name}/video").float() / 255
            result.update(self._fidelity(reference, video))
        return UnitOutput(tuple(outputs), result, device_name(self._device), peak_memory_bytes(self._device))

    def _film(self, unit: EvaluationUnit, video: Tensor) -> OutputFile:
        path = self._run.evaluation / f"{unit.name}.mp4"
        film = imwrite(
            "<bytes>", video.numpy(), extension=".mp4", plugin="pyav", codec="libx264", fps=FRAMES_PER_SECOND
        )
        assert isinstance(film, bytes)
        create_directory(path.parent)
        write_bytes_atomic(path, film)
        return OutputFile.describe(path, run=self._run.path)

    def _fidelity(self, reference: Tensor, video: Tensor) -> dict[str, float]:
        frames = reference.permute(0, 3, 1, 2), video.permute(0, 3, 1, 2)
        measured = {
            "psnr_db": min(float(psnr_db(reference, video)), EXACT_DB),
            "ssim": float(torch.as_tensor(structural_similarity_index_measure(frames[1], frames[0], data_range=1.0))),
        }
        if isinstance(self._lpips, PerceptualDistance):
            measured["lpips"] = self._lpips(*frames)
        return measured

    def _pipeline(self, folder: Path) -> Any:
        if self._opened is None or self._opened[0] != folder:
            self._opened = None
            self._opened = (folder, open_pipeline(folder, device=self._device, dtype=self._dtype))
        return self._opened[1]
