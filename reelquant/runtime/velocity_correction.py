"""Sampler-side correction (method §9.4): per step and latent channel a gain and a bias on the transformer's output.

Fitted by least squares on full-precision trajectories (`calibration.velocity_fit`); at run time it costs one multiply-add of
the output.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.runtime.generation import current_pass, not_traced


def correct_velocity(
    transformer: nn.Module, correction: VelocityCorrection, *, channel_axis: int = 1
) -> RemovableHandle:
    """Applies `correction` to every output of `transformer`, `[B, C, F, H, W]` or with the channels on another axis, until the
    returned hook is removed."""
    return transformer.register_forward_hook(partial(_corrected, correction, channel_axis))


@not_traced
def _corrected(correction: VelocityCorrection, channel_axis: int, _module: nn.Module, _args: Any, output: Any) -> Any:
    gain, bias = correction.at(current_pass().timestep)
    sample = output[0]
    shape = [-1 if axis == channel_axis else 1 for axis in range(sample.ndim)]
    scaled = sample.float() * gain.to(sample.device).view(shape) + bias.to(sample.device).view(shape)
    changed = scaled.to(sample.dtype)
    return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)
