"""Sampler-side correction (method §9.4): per step and latent channel a gain and a bias on the transformer's output.

Fitted by least squares on full-precision trajectories (`calibration.velocity_fit`); at run time it costs one multiply-add of
the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.runtime.generation import GenerationTracker


def correct_velocity(transformer: nn.Module, correction: VelocityCorrection, tracker: GenerationTracker) -> None:
    """Applies `correction` to every output `[B, C, F, H, W]` of `transformer` from now on."""

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        assert tracker.current is not None
        gain, bias = correction.at(tracker.current.timestep)
        sample = output[0]
        shape = (1, -1, 1, 1, 1)
        changed = (sample.float() * gain.to(sample.device).view(shape) + bias.to(sample.device).view(shape)).to(
            sample.dtype
        )
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    transformer.register_forward_hook(torch.compiler.disable(after))
