"""Protected early steps (method §9.3): the first steps of a generation decide same-seed fidelity, so they get more bits.

The activations of the quantized layers are then rounded with more bits than the checkpoint's, and not clipped, as the clips
are those of fewer bits; the weights stay. Up to 8 bits this costs nothing where activations run in INT8 containers anyhow.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from reelquant.checkpoint.inference_specs import StepProtection
from reelquant.quantization.input_transform import set_least_activation_bits
from reelquant.runtime.generation import current_pass, not_traced


def protect_steps(transformer: nn.Module, protection: StepProtection) -> tuple[RemovableHandle, RemovableHandle]:
    """Gives the quantized layers of `transformer` the protected steps' bits while such a step is at work in their thread,
    until the returned hooks are removed."""
    return (
        transformer.register_forward_pre_hook(partial(_raise_bits, protection)),
        transformer.register_forward_hook(_own_bits, always_call=True),
    )


@not_traced
def _raise_bits(protection: StepProtection, _module: nn.Module, _args: Any) -> None:
    set_least_activation_bits(protection.bits_at(current_pass().noise_level))


@not_traced
def _own_bits(*_: Any) -> None:
    set_least_activation_bits(None)
