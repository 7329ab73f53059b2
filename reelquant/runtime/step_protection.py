"""Protected early steps (method §9.3): the first steps of a generation decide same-seed fidelity, so they get more bits.

The activations of the quantized layers are then rounded with more bits than the checkpoint's, and not clipped, as the clips
are those of fewer bits; the weights stay. Up to 8 bits this costs nothing where activations run in INT8 containers anyhow.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from reelquant.quantization.input_transform import set_least_activation_bits
from reelquant.runtime.generation import current_pass, not_traced
from reelquant.settings.generation import StepProtection


class ProtectedSteps:
    """What `transformer.step_protection` is. `enabled = False` runs all steps alike, and `save_pretrained` then stores none."""

    def __init__(self, protection: StepProtection, stored: Any = None) -> None:
        """`stored` is what is saved of the transformer; its `spec`, a `QuantizationSpec`, follows `enabled`."""
        self.protection = protection
        self._enabled, self._stored = True, stored

    @property
    def enabled(self) -> bool:
        """Whether the first steps are protected; change it between generations."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        if self._stored is not None:
            self._stored.spec = replace(self._stored.spec, step_protection=self.protection if value else None)


def protect_steps(transformer: nn.Module, switch: ProtectedSteps) -> tuple[RemovableHandle, RemovableHandle]:
    """Gives the quantized layers of `transformer` the protected steps' bits while such a step is at work in their thread,
    until the returned hooks are removed."""
    return (
        transformer.register_forward_pre_hook(partial(_raise_bits, switch)),
        transformer.register_forward_hook(_own_bits, always_call=True),
    )


@not_traced
def _raise_bits(switch: ProtectedSteps, _module: nn.Module, _args: Any) -> None:
    if switch.enabled:
        set_least_activation_bits(switch.protection.bits_at(current_pass().noise_level))


@not_traced
def _own_bits(*_: Any) -> None:
    set_least_activation_bits(None)
