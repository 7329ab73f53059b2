"""Runs the full-precision model on one chosen sample and stores the stream at every segment boundary."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from storage.manifest import OutputFile
from storage.run_directory import RunDirectory
from workers.hub_snapshot import model_folder
from workers.kept_pipeline import full_precision
from workers.messages import ActivationSettings, Progress, SampleUnit, UnitOutput
from workers.model_source import family_of_model
from workers.out_of_memory import GENERATION_ADVICE, SHARDING_ADVICE
from workers.process import device_name, peak_memory_bytes, prepare_process
from workers.sharded_model import release_blocks


class _LastBoundary(Exception):
    """Everything that is stored has been seen; the rest of the forward pass need not run."""


class ActivationWorker:
    """Holds the full-precision model; its unit is one sample. Writes `activations/<sample>/<block>` `[L, d]` bfloat16 and
    `activations/<sample>/temb` `[d]` float32."""

    BESIDE_KEPT_PIPELINE = True
    MEMORY_ADVICE = SHARDING_ADVICE + GENERATION_ADVICE

    def __init__(self, settings: ActivationSettings) -> None:
        self._settings = settings
        self._device, self._dtype = prepare_process(settings.source.numerics)
        model = model_folder(settings.source.model)
        self._family = family_of_model(model)
        self._pipeline = full_precision(
            model,
            device=self._device,
            dtype=self._dtype,
            sharding=settings.sharding,
            variant=settings.source.variant,
        )
        self._store = RunDirectory(settings.source.run).calibration_store

    def run(self, unit: SampleUnit, progress: Progress) -> UnitOutput:
        """One forward pass, at most up to the last boundary; `write_s` of its result is the time in the store."""
        outputs: list[OutputFile] = []
        boundaries, write_s = self._settings.boundaries, 0.0

        def store(name: str, video: Tensor, text: Tensor) -> None:
            nonlocal write_s
            # The copy waits for the GPU: from here on it is the store's time.
            stream = torch.cat([video[0], text[0]]).to(torch.bfloat16).cpu()
            began = time.perf_counter()
            outputs.extend(self._store.write(f"activations/{unit.name}/{name}", stream))
            write_s += time.perf_counter() - began
            progress(boundaries.index(name) + 1, len(boundaries))

        handle = self._pipeline.transformer.time_text_embed.register_forward_hook(self._keep_temb(unit, outputs))
        try:
            self._forward(unit, store)
        finally:
            handle.remove()
        return UnitOutput(
            tuple(outputs),
            {"prompt": unit.prompt_name, "step": unit.step, "write_s": round(write_s, 3)},
            device_name(self._device),
            peak_memory_bytes(self._device),
        )

    def shadow(self, unit: SampleUnit, progress: Progress) -> None:
        """Takes part in the forward pass of a replica's unit, and keeps nothing."""
        boundaries = self._settings.boundaries
        self._forward(unit, lambda name, *_: progress(boundaries.index(name) + 1, len(boundaries)))

    def _forward(self, unit: SampleUnit, see: Callable[[str, Tensor, Tensor], None]) -> None:
        """Calls `see(name, video, text)` with the stream in front of every boundary."""
        transformer, boundaries = self._pipeline.transformer, self._settings.boundaries

        def at_boundary(name: str, args: tuple[Tensor, ...]) -> None:
            see(name, args[0], args[1])
            if name == boundaries[-1]:
                raise _LastBoundary

        handles = []
        for name in boundaries:
            block: nn.Module = transformer.get_submodule(name)
            handles.append(block.register_forward_pre_hook(lambda _m, args, name=name: at_boundary(name, args)))
        try:
            # No inference mode: FSDP on one rank reads the versions of tensors, which it has not.
            with torch.no_grad():
                transformer(**self._inputs(unit))
        except _LastBoundary:
            release_blocks(transformer, self._settings.sharding)
        finally:
            for handle in handles:
                handle.remove()

    def _keep_temb(self, unit: SampleUnit, outputs: list[OutputFile]) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
            outputs.extend(self._store.write(f"activations/{unit.name}/temb", output[0][0].float().cpu()))

        return keep

    def _inputs(self, unit: SampleUnit) -> dict[str, Any]:
        def read(name: str) -> Tensor:
            return self._store.read(f"trajectories/{unit.prompt_name}/{name}").to(self._device)

        text = read("prompt_embeds").to(self._dtype).unsqueeze(0)
        guidance = torch.tensor([self._settings.generation.guidance_scale], device=self._device, dtype=self._dtype)
        return {
            "hidden_states": read("latents")[unit.step].to(self._dtype).unsqueeze(0),
            "timestep": read("timesteps")[unit.step].reshape(1),
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(text.shape[:2], device=self._device, dtype=self._dtype),
            "pooled_projections": read("pooled_embeds").to(self._dtype).unsqueeze(0),
            "guidance": guidance * 1000.0,
            "return_dict": False,
        }
