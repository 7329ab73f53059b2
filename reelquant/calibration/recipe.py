"""What a calibration method consists of, and the bits it aims at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightLayout = Literal["per_channel", "two_level"]
AttentionTerms = Literal["none", "global", "local", "both"]


@dataclass(frozen=True)
class LayerBits:
    """Bits of one linear layer."""

    weight: int
    """2-8."""
    activation: int
    """4-8, or 16 for activations that are not quantized."""


@dataclass(frozen=True)
class SparseCalibration:
    """The sparse attention that a block is calibrated for."""

    density: float
    """In (0, 1)."""
    dense_blocks: tuple[str, ...]
    """Blocks that stay dense."""
    attention: Literal["sparse", "corrected", "dense"]
    """What the quantized block computes while it is calibrated: the band alone; the band and what it misses of the
    full-precision block's attention (a residual cache just refreshed, the only one that is defined for a single sample); or
    dense attention, as if calibrated without sparsity."""


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
    """Of GPTQ, a share of the Hessian's diagonal (`quantization.gptq`)."""
    attention_distillation: AttentionTerms = "none"
    """Attention terms of the block loss (MSAD, QuantSparse §3.2)."""
    lambda_global: float | Literal["auto"] = "auto"
    """Weight of the pooled term; `auto`: equal to the block's error at the first step."""
    lambda_local: float | Literal["auto"] = "auto"
    """Weight of the salient queries' term."""
    pool_size: int = 128
    """Consecutive tokens that are averaged for the global term (QuantSparse: 128)."""
    num_salient_tokens: int = 256
    """Queries of the local term (QuantSparse: 256)."""
    tokens_per_step: float = 1.0
    """Share of the video tokens, in (0, 1], from which a step estimates the block's error (`token_rows`); below 1 for dense
    attention only."""
    sparse: SparseCalibration | None = None
    """None for dense attention."""

    @property
    def learns(self) -> bool:
        """Whether anything is optimized by gradient."""
        return self.epochs > 0 and "learned" in (self.channel_scale, self.rotation, self.clip)

    @property
    def needs_activations(self) -> bool:
        """Whether calibration data is read at all."""
        reads = self.learns or self.rounding == "gptq" or self.channel_scale == "smoothquant"
        return reads or self.sparse is not None

    @property
    def distills_attention(self) -> bool:
        """Whether the block loss has attention terms."""
        return self.learns and self.attention_distillation != "none"
