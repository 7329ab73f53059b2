"""One seeded generation with a diffusers pipeline, and what is seen of it on the way."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from reelquant.diffusers_internals import execution_device
from reelquant.settings.generation import Generation
from workers.messages import Progress

CALL_ARGUMENTS = ("prompt", *(f.name for f in fields(Generation)), "latents", "output_type", "callback_on_step_end")
"""Names of the arguments with which `generate` calls a pipeline."""


@dataclass
class Generated:
    """A video and the way to it."""

    video: Tensor
    """uint8 `[F, H, W, 3]`."""
    latents: list[Tensor] = field(default_factory=list)
    """Float32 `[C, F, H, W]` on the CPU: the noise, then the latents after every step."""
    step_seconds: list[float] = field(default_factory=list)
    """Wall time of every denoising step."""


def generate(
    pipeline: Any, prompt: str, generation: Generation, *, seed: int, progress: Progress, decode: bool = True
) -> Generated:
    """Generates one video. The noise is drawn on the CPU, so it is the same on every device.

    Args:
        decode: without it, the result has no video.
    """
    device = execution_device(pipeline)
    latents = randn_tensor(
        latent_shape(pipeline, generation), generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    ).to(device)
    result = Generated(torch.empty(0))
    result.latents.append(latents[0].cpu())
    started = time.perf_counter()

    def after_step(_pipeline: Any, step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        nonlocal started
        result.latents.append(state["latents"][0].float().cpu())
        now = time.perf_counter()
        result.step_seconds.append(now - started)
        started = now
        progress(step + 1, generation.num_inference_steps)
        return state

    # No inference mode: layers that read one tensor share its transform by the tensor's version, which it has not.
    with torch.no_grad():
        frames = pipeline(
            prompt,
            **asdict(generation),
            latents=latents,
            output_type="pt" if decode else "latent",
            callback_on_step_end=after_step,
        ).frames[0]
    if decode:
        result.video = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return result


def latent_shape(pipeline: Any, generation: Generation) -> tuple[int, int, int, int, int]:
    """`(1, C, F, H, W)` of the latents of one video."""
    spatial, temporal = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
    return (
        1,
        pipeline.transformer.config.in_channels,
        (generation.num_frames - 1) // temporal + 1,
        generation.height // spatial,
        generation.width // spatial,
    )
