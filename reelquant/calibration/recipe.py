"""What a calibration method consists of, and the bits it aims at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightLayout = Literal["per_channel", "two_level"]


@dataclass(frozen=True)
class LayerBits:
    """Bits of one linear layer."""

    weight: int
    """2-8."""
    activation: int
    """4-8, or 16 for activations that are not quantized."""


@dataclass(frozen=True)
class Recipe:
    """One calibration method. The presets of the application differ in these fields only."""

    channel_scale: Literal["none", "smoothquant", "learned"]
    rotation: Literal["none", "hadamard", "learned"]
    clip: Literal["none", "learned"]
    rounding: Literal["nearest", "gptq"]
    solve: Literal["plain", "asymmetric"]
    """Targets of GPTQ: the layer on the quantized stream's inputs, or on the full-precision stream's (method §9.2)."""
    token_weights: bool
    """Weight tokens by what they receive from attention (S²Q-VDiT §3.3), in the loss and in the Hessian."""
    weight_layout: WeightLayout
    epochs: int
    learning_rate_transform: float
    """Of channel scale and rotation (both papers: 5e-3)."""
    learning_rate_clip: float
    """Of clip thresholds (both papers: 5e-2)."""
    lambda_min: float
    smoothing_alpha: float
    rotation_block: int
    """Largest side of the rotation's blocks, a power of two; 128 costs nothing beside the weights of a large model."""
    damping: float
    """Of GPTQ, relative to the mean of the Hessian's diagonal."""

    @property
    def learns(self) -> bool:
        """Whether anything is optimized by gradient."""
        return self.epochs > 0 and "learned" in (self.channel_scale, self.rotation, self.clip)

    @property
    def needs_activations(self) -> bool:
        """Whether calibration data is read at all."""
        return self.learns or self.rounding == "gptq" or self.channel_scale == "smoothquant"
