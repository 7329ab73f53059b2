"""The velocity that the sampler takes at every step of a generation, seen and changed inside diffusers' own pipeline.

    transformer (one pass or more)  ->  guided combination  ->  scheduler.step
                 outputs                     velocity            next latents

The velocity is the argument `model_output` of `pipeline.scheduler.step`, so it is the guided combination of every family's own
pipeline; the outputs of the transformer's passes before it stand beside it. Models that predict something else than a velocity
(noise, the denoised video) are measured by that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER
from reelquant.families.family import Family
from reelquant.settings.generation import Generation
from workers.messages import Progress, PromptUnit
from workers.pipeline_call import attribute, called

Change = Callable[[int, Tensor, Tensor], Tensor]
"""Called with the step (from 0), velocity and latents `[B, ...]`; returns the velocity that the scheduler takes."""
Watch = Callable[[int, Tensor, Sequence[Tensor]], None]
"""Called with the step, the velocity `[B, C, F, H, W]`, and the output of every pass of the step, each of the same shape."""


@contextmanager
def changed_velocities(pipeline: Any, change: Change) -> Iterator[None]:
    """While open, the scheduler of `pipeline` takes the velocities that `change` returns."""
    original, steps = pipeline.scheduler.step, iter(range(1 << 30))
    signature = inspect.signature(original)

    @functools.wraps(original)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.arguments["model_output"] = change(next(steps), call.arguments["model_output"], call.arguments["sample"])
        return original(*call.args, **call.kwargs)

    with attribute(pipeline.scheduler, "step", step):
        yield


@contextmanager
def changed_latents(pipeline: Any, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While open, every step of `pipeline` ends with the latents `[B, ...]` that `change` returns of those of the scheduler."""
    original, steps = pipeline.scheduler.step, iter(range(1 << 30))

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        latents, *others = original(*args, **kwargs)
        return change(next(steps), latents), *others

    with attribute(pipeline.scheduler, "step", step):
        yield


@contextmanager
def given_noise(pipeline: Any, latents: Tensor) -> Iterator[None]:
    """While open, generations of `pipeline` begin with `latents` `[B, ...]`, whatever it draws and makes of that.

    Random numbers are drawn as without, so that what is drawn later on is the same. Of a frame that is an image's and that the
    scheduler does not have, the pipeline's own stays.
    """
    original = pipeline.prepare_latents

    @functools.wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        own, *others = found if isinstance(found, tuple) else (found,)
        given = latents.to(own)
        if given.shape != own.shape:
            given = torch.cat([own[:, :, : own.shape[2] - given.shape[2]], given], dim=2)
        return (given, *others) if isinstance(found, tuple) else given

    with attribute(pipeline, "prepare_latents", prepare):
        yield


@contextmanager
def watched_velocities(pipeline: Any, watch: Watch) -> Iterator[None]:
    """While open, every step of one generation of `pipeline` is shown to `watch`."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output.sample)

    def see(step: int, velocity: Tensor, _sample: Tensor) -> Tensor:
        # A pipeline may put several passes into one batch.
        passes = [part for output in outputs for part in output.chunk(len(output) // len(velocity))]
        outputs.clear()
        watch(step, velocity, passes)
        return velocity

    with ExitStack() as stack:
        for transformer in transformers(pipeline):
            stack.callback(transformer.register_forward_hook(keep).remove)
        stack.enter_context(changed_velocities(pipeline, see))
        yield


def named_transformers(pipeline: Any) -> dict[str, Any]:
    """The transformers of a pipeline by component: one, or one for each part of the schedule."""
    found = {name: getattr(pipeline, name, None) for name in (TRANSFORMER, SECOND_TRANSFORMER)}
    return {name: model for name, model in found.items() if model is not None}


def transformers(pipeline: Any) -> list[Any]:
    """The transformers of a pipeline, in the order in which they serve."""
    return list(named_transformers(pipeline).values())


def run_latents(
    pipeline: Any,
    prompts: Sequence[PromptUnit],
    generation: Generation,
    *,
    latents: Tensor,
    seeds: Sequence[int],
    after_step: Callable[[int, Tensor], Tensor],
    progress: Progress,
) -> None:
    """Calls `pipeline` with several prompts at once, from given latents, without decoding.

    Args:
        latents: `[B, C, F, H, W]` those with which the first step of each prompt begins.
        seeds: of each prompt, for what the pipeline draws besides.
        after_step: called with the step and the latents after it; returns those with which the next step begins.
    """

    def end_step(step: int, own: Tensor) -> Tensor:
        progress(step + 1, generation.num_inference_steps)
        return after_step(step, own)

    # No inference mode, as in `generate`.
    with torch.no_grad(), given_noise(pipeline, latents), changed_latents(pipeline, end_step):
        drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
        called(pipeline, prompts, generation, generator=drawn, output_type="latent")


def teacher_forced(
    pipeline: Any,
    prompts: Sequence[PromptUnit],
    generation: Generation,
    *,
    latents: Tensor,
    seeds: Sequence[int],
    watch: Watch,
    progress: Progress,
) -> None:
    """Shows `watch` the velocities of `pipeline` on given trajectories: every step begins with the given latents, whatever the
    step before has made. The steps come in order, so that what a model carries from step to step is as in a generation.

    Args:
        latents: `[T+1, B, C, F, H, W]` of each prompt: the noise, then the latents after every step.
        seeds: those of the trajectories.
    """
    with watched_velocities(pipeline, watch):
        run_latents(
            pipeline,
            prompts,
            generation,
            latents=latents[0],
            seeds=seeds,
            after_step=lambda step, own: latents[step + 1].to(own),
            progress=progress,
        )


@contextmanager
def passes_left_out(pipeline: Any, family: Family, leave_out: Callable[[], bool]) -> Iterator[None]:
    """While open, a pass of a transformer returns zeros at once as long as `leave_out()` says so: for steps whose velocity is
    known, and given by `changed_velocities`."""
    with ExitStack() as stack:
        for transformer in transformers(pipeline):
            stack.enter_context(attribute(transformer, "forward", _unless(leave_out, family, transformer)))
        yield


def _unless(leave_out: Callable[[], bool], family: Family, transformer: Any) -> Callable[..., Any]:
    original = transformer.forward

    @functools.wraps(original)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if leave_out():
            return (torch.zeros_like(family.latents(transformer.config, hidden_states)),)
        return original(hidden_states, *args, **kwargs)

    return forward
