"""What is run: sizes of model and video, and the pipeline's configuration that follows from them."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import ROOT

PROMPTS = ROOT / "configs" / "prompts"
STALL_TIMEOUT_S = 300.0
"""Several times the longest silence expected, that of an assembly, which writes and reads 7 GiB; well within a slot of ten
minutes, so that a worker that hangs is named with its stack."""


@dataclass(frozen=True)
class Setting:
    """One run of the benchmark."""

    video: tuple[int, int, int]
    """Height, width, frames."""
    model: str
    """Of `configs/models`."""
    transformer: dict[str, Any]
    """Other values of its configuration than the model's."""
    vae: dict[str, Any]
    """Other values of its configuration than the model's."""
    set: dict[str, Any]
    """Values of the pipeline's configuration by names such as `distillation.tokens_per_step`."""
    sharding: str
    offload: str
    offload_path: str | None
    workers: int
    """GPUs that are used, or processes on a CPU; all of them share the full-precision model, where it is sharded."""
    on_gpu: bool
    threads: int
    """CPU threads of one worker."""
    steps: int
    """Denoising steps of a trajectory."""
    samples: int
    """Calibration samples."""
    epochs: int
    preset: str
    """Of the method."""
    rounding: str
    segment_length: int
    deterministic: bool
    """Whether a segment distilled twice has the same bytes."""
    beside: bool
    """Whether one worker distills at the same time as all, on a GPU more."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Setting:
        """From the command line, with what this machine has in place of what is not said."""
        gpus = torch.cuda.device_count()
        workers = options.workers or gpus or 2
        if 0 < gpus < workers:
            raise SystemExit(f"--workers {workers}: there are {gpus} GPUs here")
        if options.beside and 0 < gpus <= workers:
            raise SystemExit(f"--beside needs a GPU more than the {workers} of --workers: there are {gpus} here")
        if options.offload != "none" and options.sharding == "none":
            raise SystemExit(f"--offload {options.offload} needs --sharding fsdp or deepspeed")
        height, width, num_frames = (int(part) for part in options.video.split("x"))
        given = {name: getattr(options, name) for name in cls.__dataclass_fields__ if hasattr(options, name)}
        path = None if options.offload_path is None else str(options.offload_path.absolute())
        threads = options.threads or max(1, min(8, (os.cpu_count() or 1) // workers))
        changed = {name: values(getattr(options, name)) for name in ("transformer", "vae", "set")}
        derived = {**changed, "workers": workers, "on_gpu": gpus > 0, "threads": threads, "offload_path": path}
        return cls(**{**given, **derived, "video": (height, width, num_frames)})

    @property
    def label(self) -> str:
        """Such as `480p fsdp`, with what is not usual."""
        model = f"{self.model} " if self.model != "hunyuanvideo-13b" else ""
        offload = f", offload {self.offload}" if self.offload != "none" else ""
        preset = f", {self.preset}" if self.preset != "reelquant" else ""
        nearest = ", to nearest" if self.rounding == "nearest" else ""
        deterministic = ", deterministic" if self.deterministic else ""
        return f"{model}{self.video[0]}p {self.sharding}{offload}{preset}{nearest}{deterministic}"

    def as_json(self) -> dict[str, Any]:
        """For the record; where files lie is no part of it."""
        return {name: value for name, value in asdict(self).items() if name != "offload_path"}

    def write_config(
        self, path: Path, *, run: Path, model: Path, workers: int | None = None, epochs: int | None = None
    ) -> Path:
        """The pipeline's configuration file.

        Args:
            workers: for stages that do not run the full-precision model: so many workers of one GPU, and no replica.
            epochs: instead of its own.
        """
        height, width, num_frames = self.video
        how: dict[str, Any] = {"num_gpus": 1 if self.on_gpu else 0, "num_workers": workers or self.workers}
        if workers is None and self.sharding != "none":
            how |= {"sharding": self.sharding, "gpus_per_replica": self.workers, "offload": self.offload}
            how |= {"offload_path": self.offload_path} if self.offload == "nvme" else {}
        config: dict[str, Any] = {
            "run": str(run),
            "model": str(model),
            "generation": {
                "height": height,
                "width": width,
                "num_frames": num_frames,
                "num_inference_steps": self.steps,
            },
            "prompts": {
                "calibration": str(PROMPTS / "scenes_calibration.txt"),
                # One a worker, and more where so few steps have too few candidates.
                "num_calibration": max(self.workers, math.ceil(self.samples / self.steps)),
                "held_out": str(PROMPTS / "scenes_held_out.txt"),
                "num_held_out": 1,
            },
            # The hooks' cost is part of what is measured.
            "selection": {"num_samples": self.samples, "recorded_features": ["block_input", "weight_error"]},
            "method": {"preset": self.preset, "epochs": epochs or self.epochs, "rounding": self.rounding},
            # Of random weights nobody knows whether a block diverges: it is rounded then, and counted.
            "distillation": {"segment_length": self.segment_length, "on_failure": "gptq"},
            "evaluation": {"films": False},
            "numerics": {"threads": self.threads, "deterministic": self.deterministic},
            "workers": {**how, "max_attempts": 2, "stall_timeout_s": STALL_TIMEOUT_S},
            "cluster": {"address": "local"},
        }
        for name, value in self.set.items():
            *sections, key = name.split(".")
            part: dict[str, Any] = config
            for section in sections:
                part = part.setdefault(section, {})
            part[key] = value
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path


def values(pairs: list[str]) -> dict[str, Any]:
    """Of `KEY=VALUE`, as YAML reads them."""
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}
