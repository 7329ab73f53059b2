"""One seeded generation with a diffusers pipeline, and what is seen of it on the way.

pipeline: [transformer (one or two calls of a step) -> guided combination -> scheduler.step] x steps -> decoding
                 `watched_calls`                                                  `generate`
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.calibration.block_call import arguments, of_element
from reelquant.families.family import Family
from reelquant.settings.generation import Generation
from workers.messages import Progress, PromptUnit
from workers.pipeline_call import attribute, called
from workers.velocity_watch import changed_latents, changed_velocities, named_transformers

COND, UNCOND = "cond", "uncond"
SeeCall = Callable[[str, str, dict[str, Any]], None]
"""Called with the transformer's component, the branch and the arguments of its call for one video."""


@dataclass
class Generated:
    """A video and the way to it."""

    video: Tensor
    """uint8 `[F, H, W, 3]`."""
    latents: list[Tensor] = field(default_factory=list)
    """Float32, on the CPU, without the batch's axis: the noise, then the latents after every step."""
    step_seconds: list[float] = field(default_factory=list)
    """Wall time of every denoising step."""


def branches(family: Family, generation: Generation) -> tuple[str, ...]:
    """Calls of one step for one video, the conditional one first: two with classifier-free guidance."""
    return (COND,) if family.guidance == "one_pass" or generation.guidance_scale <= 1 else (COND, UNCOND)


def generate(
    pipeline: Any, prompt: PromptUnit, generation: Generation, *, seed: int, progress: Progress, decode: bool = True
) -> Generated:
    """Generates one video. The pipeline draws the noise on the CPU, so it is the same on every device.

    Args:
        decode: without it, the result has no video.
    """
    result = Generated(torch.empty(0))
    started = time.perf_counter()

    def before_step(step: int, velocity: Tensor, sample: Tensor) -> Tensor:
        if step == 0:
            result.latents.append(sample[0].float().cpu())
        return velocity

    def after_step(step: int, latents: Tensor) -> Tensor:
        nonlocal started
        result.latents.append(latents[0].float().cpu())
        now = time.perf_counter()
        result.step_seconds.append(now - started)
        started = now
        progress(step + 1, generation.num_inference_steps)
        return latents

    # No inference mode: FSDP on one rank reads the versions of tensors, which it has not.
    with torch.no_grad(), changed_velocities(pipeline, before_step), changed_latents(pipeline, after_step):
        frames = called(
            pipeline,
            prompt,
            generation,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pt" if decode else "latent",
        )[0]
    if decode:
        result.video = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return result


@contextmanager
def watched_calls(pipeline: Any, family: Family, see: SeeCall) -> Iterator[None]:
    """While open, `see` is shown every call of the transformers of `pipeline`, a branch at a time."""
    with ExitStack() as stack:
        for role, transformer in named_transformers(pipeline).items():
            names: list[str] = []
            if hasattr(transformer, "cache_context"):
                named = functools.partial(_named, names, transformer.cache_context)
                stack.enter_context(attribute(transformer, "cache_context", named))

            def before(module: nn.Module, args: Any, kwargs: Any, role: str = role, names: list[str] = names) -> None:
                call = arguments(module, args, kwargs)
                for item, branch in enumerate(_branches(family, call, names)):
                    see(role, branch, of_element(call, item, len(call["hidden_states"])))

            stack.callback(transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


@contextmanager
def _named(names: list[str], context: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """A transformer's `cache_context` that leaves its name in `names` while it is open."""
    names.append(name)
    try:
        with context(name, *args, **kwargs):
            yield
    finally:
        names.pop()


def _branches(family: Family, call: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    """Branches of the elements of a call's batch."""
    if family.guidance == "batched":
        return (UNCOND, COND) if len(call["hidden_states"]) == 2 else (COND,)
    return (UNCOND if names and names[-1].endswith(UNCOND) else COND,)
