"""Protected early steps (method §9.3): the first steps of a generation decide same-seed fidelity, so they get more bits.

The activations of the quantized layers are then rounded with more bits than the checkpoint's, and not clipped, as the clips
are those of fewer bits; the weights stay. Up to 8 bits this costs nothing where activations run in INT8 containers anyhow.
"""

from __future__ import annotations

from torch import nn

from reelquant.checkpoint.inference_specs import StepProtection
from reelquant.quantization.linear import QuantizedLinear
from reelquant.runtime.generation import GenerationState, GenerationTracker


def protect_steps(transformer: nn.Module, protection: StepProtection, tracker: GenerationTracker) -> None:
    """Gives the quantized layers of `transformer` the protected steps' bits while such a step is at work."""
    transforms = [
        module.input_transform
        for module in transformer.modules()
        if isinstance(module, QuantizedLinear) and module.input_transform is not None
    ]

    def switch(state: GenerationState) -> None:
        protected = state.step < protection.num_steps
        for transform in transforms:
            transform.raise_bits(protection.activation_bits if protected else None)

    tracker.observe(switch)
