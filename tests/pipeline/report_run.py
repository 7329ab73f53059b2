"""A run directory with what the workers write: real Zarr arrays, records and events, without any model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from imageio.v3 import imwrite
from torch import Tensor

from pipeline.config.method import parse_method
from pipeline.config.schema import RunConfig
from pipeline.run_units import evaluation_names
from storage.atomic_files import create_directory
from storage.cache import UnitRecord, fingerprint
from storage.run_directory import RunDirectory
from storage.unit_store import UnitAddress, UnitStore
from tests.pipeline.small_run import list_units

DOUBLE_LAYERS = (
    "norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff_context.net.0.proj", "ff.net.2",
    "ff_context.net.2",
)  # fmt: skip
SINGLE_LAYERS = ("norm.linear", "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v", "proj_out")
BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COMMIT = "0123abcd" * 5
LOSS_PER_METHOD = {"s2q": 0.03, "rtn": 0.11, "quarot": 0.07, "gptq": 0.05, "smoothquant": 0.09}


@dataclass(frozen=True)
class RunShape:
    """How large the run is."""

    prompts: tuple[str, ...] = ("a cat", "a dog on grass", "rain")
    held_out: tuple[str, ...] = ("a boat", "two birds", "snow")
    num_steps: int = 5
    num_samples: int = 4
    num_double: int = 2
    num_single: int = 3
    segment_length: int = 2
    methods: tuple[str, ...] = ("s2q", "rtn")
    epochs: int = 3
    tokens_per_step: float = 1.0
    video: tuple[int, int, int] = (5, 24, 32)
    """Frames, height, width."""
    recognizer: bool = True
    num_workers: int = 2
    films: bool = False


class RunMaker:
    """Writes one stage after the other, as the runner does; stop anywhere for an incomplete run."""

    def __init__(self, path: Path, shape: RunShape) -> None:
        self.shape = shape
        methods = [parse_method({"preset": m, **self._learning(m)}) for m in shape.methods]
        self.config = RunConfig.model_validate(
            {
                "run": path,
                "model": "models/small-video-model",
                "generation": {"height": 80, "width": 96, "num_frames": 29, "num_inference_steps": shape.num_steps},
                "prompts": {
                    "calibration": "prompts/calibration.txt",
                    "num_calibration": len(shape.prompts),
                    "held_out": "prompts/held_out.txt",
                    "num_held_out": len(shape.held_out),
                },
                "selection": {"num_samples": shape.num_samples},
                "method": methods[0].to_dict(),
                "compare": [method.to_dict() for method in methods[1:]],
                "distillation": {"segment_length": shape.segment_length},
                "evaluation": {"recognizer": "assets/recognizer" if shape.recognizer else None},
            }
        )
        self.directory = RunDirectory.open_or_create(
            path, self.config.identity(), {"commit": COMMIT, "python": "3.11.7", "packages": {"torch": "2.13.0"}}
        )
        self.generator = torch.Generator().manual_seed(0)
        self.now = BEGAN
        create_directory(self.directory.logs)
        self.event("run_started", host="node-a", pid=1)

    def _learning(self, method: str) -> dict[str, Any]:
        learning = {"epochs": self.shape.epochs, "tokens_per_step": self.shape.tokens_per_step}
        return learning if method == "s2q" else {}

    def everything(self, **fell_back: str) -> RunMaker:
        """All stages."""
        self.trajectories()
        self.selection()
        self.activations()
        self.distillation(fell_back)
        self.assembly()
        self.evaluation()
        self.event("run_finished")
        return self

    def event(self, kind: str, **values: Any) -> None:
        line = json.dumps({"time": self.now.isoformat(timespec="milliseconds"), "event": kind, **values})
        with (self.directory.logs / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def begin(self, stage: str, total: int) -> None:
        self.event("stage", stage=stage, total=total, pending=total)
        self.now += timedelta(seconds=4)

    def record(
        self,
        stage: str,
        unit: str,
        result: dict[str, Any],
        arrays: Mapping[str, Tensor] | None = None,
        files: Mapping[str, bytes] | None = None,
        **changes: Any,
    ) -> None:
        """One finished unit, in the cache and in the event log."""
        seconds, worker = changes.get("seconds", 2.5), f"worker-{hash_of(unit) % self.shape.num_workers}"
        self.event("unit_started", stage=stage, unit=unit, worker=worker)
        self.now += timedelta(seconds=seconds)
        self.event("unit_finished", stage=stage, unit=unit, seconds=seconds, attempt=1)
        of, cache = fingerprint({stage: unit}), self.directory.cache
        with UnitStore(UnitAddress(cache.location, self.directory.location, stage, unit, of)) as store:
            for name, tensor in (arrays or {}).items():
                store.write(f"{stage}/{unit}/{name}", tensor)
            for name, content in (files or {}).items():
                store.write_file(f"{stage}/{unit}/{name}", partial(_write, content=content))
            outputs = store.publish()
        cache.remove(stage, of)
        cache.create(
            UnitRecord(
                stage, unit, of, store.attempt, outputs, result, seconds, "node-a", "cpu (x86_64)", 700 * 2**20,
                changes.get("attempt", 1), worker,
            ),
            self.directory.place,
        )  # fmt: skip
        list_units(self.directory, stage, *(evaluation_names(self.config) if stage == "evaluation" else ()), unit)

    def trajectories(self) -> None:
        self.begin("trajectories", len(self.shape.prompts))
        steps = self.shape.num_steps
        for index, prompt in enumerate(self.shape.prompts):
            name = f"prompt-{index:03d}"
            arrays = {
                "latents": torch.randn(steps + 1, 4, 2, 3, 4, generator=self.generator),
                "diffusion": torch.rand(steps, generator=self.generator),
            }
            result = {"prompt": prompt, "seconds_per_step": 0.2, "num_steps": steps}
            self.record("trajectories", name, result, arrays)

    def selection(self, **changes: Any) -> None:
        self.begin("selection", 1)
        num_prompts, steps = len(self.shape.prompts), self.shape.num_steps
        ramp = torch.linspace(1, 0, steps).square()
        scores = {
            name: scale * (ramp + 0.35 * torch.rand(num_prompts, steps, generator=self.generator)).double()
            for name, scale in (("diffusion", 0.1), ("latent", 1300.0), ("block_input", 1.0), ("weight_error", 0.3))
        }
        product = scores["diffusion"] * scores["latent"]
        best = product.flatten().argsort(descending=True)[: self.shape.num_samples].tolist()
        self.chosen = [(i // steps, i % steps) for i in best]
        result = {
            "strategy": "salience",
            "quantization_feature": "latent",
            "num_steps": steps,
            "prompts": [{"name": f"prompt-{i:03d}", "prompt": p} for i, p in enumerate(self.shape.prompts)],
            "scores": {name: values.tolist() for name, values in scores.items()},
            "chosen": [{"prompt": f"prompt-{p:03d}", "step": s} for p, s in self.chosen],
        }
        self.record("selection", "selection", {**result, **changes})

    def activations(self) -> None:
        self.begin("activations", len(self.chosen))
        for prompt, step in self.chosen:
            self.record(
                "activations", f"prompt-{prompt:03d}-step-{step:03d}", {"prompt": f"prompt-{prompt:03d}", "step": step}
            )

    @property
    def blocks(self) -> list[str]:
        double = [f"transformer_blocks.{i}" for i in range(self.shape.num_double)]
        return [*double, *(f"single_transformer_blocks.{i}" for i in range(self.shape.num_single))]

    def distillation(self, fell_back: dict[str, str] | None = None) -> None:
        length, blocks = self.shape.segment_length, self.blocks
        segments = [blocks[i : i + length] for i in range(0, len(blocks), length)]
        self.begin("distillation", len(self.shape.methods) * (len(segments) + 1))
        for method in self.shape.methods:
            for index, segment in enumerate(segments):
                summaries = {
                    name: self._block(method, name, position, (fell_back or {}).get(name.replace(".", "_")))
                    for position, name in enumerate(segment)
                }
                unit = f"{method}-segment-{index:03d}"
                self.record(
                    "distillation",
                    unit,
                    {"method": method, "blocks": summaries},
                    files=artifacts(*segment),
                    seconds=30.0,
                )
            result = {"method": method, "blocks": {}}
            self.record("distillation", f"{method}-auxiliary", result, files=artifacts("auxiliary"))

    def _block(self, method: str, name: str, position: int, fell_back: str | None) -> dict[str, Any]:
        if method in ("rtn", "quarot"):
            return {"losses": [], "loss_before": None, "loss_after": None, "layer_sqnr_db": {}, "fell_back": None}
        depth = self.blocks.index(name)
        start = 1e-3 * math.exp(0.12 * depth) * (1 + 0.5 * position)
        learned = method == "s2q" and fell_back is None
        noise = torch.rand(30, generator=self.generator)
        losses = [
            start * (0.25 + 0.75 * math.exp(-e)) * float(1 + 0.1 * noise[e % 30]) for e in range(self.shape.epochs)
        ]
        layers = SINGLE_LAYERS if name.startswith("single") else DOUBLE_LAYERS
        sqnr = {
            layer: 100.0 if layer == "norm1_context.linear" and depth == 0
            else 30 - 0.15 * depth - position - 6 * layer.endswith("net.2") + 3 * float(noise[i])
            for i, layer in enumerate(layers)
        }  # fmt: skip
        after = start * (0.3 if learned else 0.6)
        return {
            "losses": losses if learned else [], "loss_before": start, "loss_after": after, "layer_sqnr_db": sqnr,
            "fell_back": fell_back,
        }  # fmt: skip

    def assembly(self) -> None:
        self.begin("assembly", len(self.shape.methods))
        for index, method in enumerate(self.shape.methods):
            num_bytes = 6_970_000_000 + 5_000_000 * index
            result = {
                "method": method, "bits": "W4A6", "checkpoint": "checkpoint", "transformer_bytes": num_bytes,
                "source_bytes": 25_640_000_000, "compression": 25_640_000_000 / num_bytes,
            }  # fmt: skip
            self.record("assembly", method, result)

    def evaluation(self, models: Sequence[str] | None = None, **extra: float) -> None:
        prompts = self.shape.held_out
        models = ("full_precision", *self.shape.methods) if models is None else models
        self.begin("evaluation", len(prompts))
        for model in models:
            if model == self.shape.methods[0]:
                self.begin("evaluation", len(prompts) * len(self.shape.methods))
            for index, prompt in enumerate(prompts):
                self._evaluate(model, index, prompt, extra)
        self._velocities(models)

    def _velocities(self, models: Sequence[str]) -> None:
        """Teacher-forced passes over the first prompt, and the weights of the steps."""
        steps = self.shape.num_steps
        if "full_precision" in models:
            self.record("evaluation", "step_weights", {"weights": [1.0] * steps, "effects": [[0, 1.0]]})
        for model in models:
            if model != "full_precision":
                errors = {"velocity_error": [LOSS_PER_METHOD[model] ** 2 * (1 + step) for step in range(steps)]}
                self.record("evaluation", f"{model}-velocity-000", {"prompts": {"prompt-000": errors}})

    def _evaluate(self, model: str, index: int, prompt: str, extra: dict[str, float]) -> None:
        reference = self._video(index)
        result: dict[str, Any] = {"prompt": prompt, "seconds_per_step": 0.25}
        video = reference
        if model == "full_precision" and index == 0:
            result["denoised_changes"] = [0.3, 0.1, *[0.01] * (self.shape.num_steps - 3)]
        if model != "full_precision":
            sigma = LOSS_PER_METHOD[model] * (1 + 0.4 * index / max(1, len(self.shape.held_out)))
            smooth = torch.randn(reference.shape, generator=self.generator) * sigma
            video = (reference + smooth).clamp(0, 1)
            error = (video - reference).square().mean()
            result |= {
                "psnr_db": float(-10 * error.log10()),
                "ssim": 1 - 5 * sigma**1.5,
                "latent_error": [sigma**2 * (1 + step) for step in range(self.shape.num_steps)],
                "seconds_per_step": 0.6,
                **extra,
            }
        if self.shape.recognizer:
            result["recognized"] = model in ("full_precision", "s2q") or index % 2 == 0
        name = f"{model}-prompt-{index:03d}"
        stored = (video * 255).round().to(torch.uint8)
        files = {}
        if self.shape.films:
            film = imwrite("<bytes>", stored.numpy(), extension=".mp4", plugin="pyav", codec="libx264", fps=24)
            files = {"film.mp4": film}
        self.record("evaluation", name, result, {"video": stored}, files)

    def _video(self, index: int) -> Tensor:
        """A disc that moves over a gradient, `[F, H, W, 3]` in 0..1."""
        frames, height, width = self.shape.video
        y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
        pictures = []
        for frame in range(frames):
            centre = 0.2 + 0.6 * frame / max(1, frames - 1), 0.3 + 0.4 * (index % 3) / 2
            disc = ((x - centre[0]).square() + (y - centre[1]).square() < 0.03).float()
            pictures.append(
                torch.stack([0.2 + 0.5 * disc, 0.15 + 0.3 * x + 0.4 * disc, 0.35 + 0.2 * y - 0.2 * disc], -1)
            )
        return torch.stack(pictures).clamp(0, 1)


def artifacts(*names: str) -> dict[str, bytes]:
    """Files by name."""
    return {f"{name}.safetensors": b"artifact of " + name.encode() for name in names}


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def hash_of(text: str) -> int:
    """The same in every process."""
    return sum(text.encode())
