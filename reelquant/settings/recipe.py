"""Calibration methods, and the presets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from reelquant.settings.attention import Residual, SparseAttention
from reelquant.settings.declaration import Bounds, Settings

WeightLayout = Literal["per_channel", "two_level"]
AttentionTerms = Literal["none", "global", "local", "both"]
Preset = Literal["rtn", "smoothquant", "quarot", "gptq", "s2q", "quantsparse", "reelquant", "s2q_quantsparse"]

RESERVED_NAMES = frozenset({"full_precision", "noise_floor"})
"""Models of the evaluation that are no method's."""
_CALIBRATION_IGNORES = {
    "preset", "name", "attention", "protected_steps", "protected_activation_bits", "drift_repair", "velocity_correction",
}  # fmt: skip
"""Fields of a recipe that the calibration of its blocks does not read; of `attention` it reads a part."""


@dataclass(frozen=True)
class Recipe(Settings):
    """One calibration method: a preset and its changes; a field left out takes the preset's value."""

    preset: Preset = "rtn"
    """Which of the presets to start from; `s2q_quantsparse` if none is named and the attention is sparse."""
    name: str = ""
    """Of folders and tables; the preset's if empty."""
    channel_scale: Literal["none", "smoothquant", "learned"] = "none"
    """Division of every input channel in front of a linear layer."""
    rotation: Literal["none", "hadamard", "learned"] = "none"
    """Orthogonal blocks behind the channel scale."""
    clip: Literal["none", "learned"] = "none"
    """Clip thresholds of weights (per output channel) and activations (per input group)."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """How weights become integers."""
    solve: Literal["plain", "asymmetric"] = "plain"
    """GPTQ's targets: the layer on the quantized stream's inputs; `asymmetric` aims at the full-precision stream's outputs
    (method §9.2)."""
    token_weights: bool = False
    """Weight tokens by the attention they receive (S²Q-VDiT §3.3), in the loss and in the Hessian."""
    weight_layout: WeightLayout = "per_channel"
    """`two_level`: integer scales of groups of 64 inputs on top (method §9.1); 0.125 bits more per weight."""
    epochs: Annotated[int, Bounds(ge=0)] = 0
    """Passes over the samples per block (both papers: 15; 5 in our presets, with which they were measured)."""
    learning_rate_transform: Annotated[float, Bounds(gt=0)] = 5e-3
    """Of channel scale and rotation (both papers: 5e-3)."""
    learning_rate_clip: Annotated[float, Bounds(gt=0)] = 5e-2
    """Of clip thresholds (both papers: 5e-2)."""
    lambda_min: Annotated[float, Bounds(ge=0, le=1)] = 0.5
    """Smallest token weight."""
    smoothing_alpha: Annotated[float, Bounds(ge=0, le=1)] = 0.5
    """SmoothQuant's exponent."""
    rotation_block: Literal[16, 32, 64, 128] = 128
    """Largest side of the rotation's blocks. 128 takes 0.1 % of a large model's bytes; models of a few MB want 64 or less."""
    damping: Annotated[float, Bounds(gt=0)] = 0.01
    """Of GPTQ, a share of the Hessian's diagonal (`reelquant.quantization.gptq`)."""
    attention_distillation: AttentionTerms = "none"
    """Attention terms of the block loss (MSAD, QuantSparse §3.2)."""
    lambda_global: float | Literal["auto"] = "auto"
    """Weight of the pooled term; `auto`: as large as the block's error at the first step."""
    lambda_local: float | Literal["auto"] = "auto"
    """Weight of the salient queries' term."""
    pool_size: Annotated[int, Bounds(ge=1)] = 128
    """Consecutive tokens averaged for the global term (QuantSparse: 128)."""
    num_salient_tokens: Annotated[int, Bounds(ge=1)] = 256
    """Queries of the local term (QuantSparse: 256)."""
    tokens_per_step: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    """Share of the video tokens from which a learning step estimates the block's error, drawn anew in every step; below 1 a
    step is faster (at 720p most of it is attention, which then has fewer queries) and losses of epochs are estimates. The
    losses before and after calibration, and GPTQ, see all tokens."""
    attention: SparseAttention = SparseAttention()
    """Sparse attention."""
    protected_steps: int | float = 0
    """First steps with finer activations (method §9.3); below 1, their share of all steps."""
    protected_activation_bits: int = 8
    """Activation bits of the protected steps; 8 cost nothing where fewer run in INT8 containers."""
    drift_repair: bool = False
    """A last, sequential pass: gain and bias of every block's output layers against the drift of all blocks before."""
    velocity_correction: bool = False
    """Gain and bias of the model's output per step and latent channel (method §9.4)."""

    @property
    def learned_parts(self) -> list[str]:
        """Names of the fields that are `learned`."""
        return [name for name in ("channel_scale", "rotation", "clip") if getattr(self, name) == "learned"]

    @property
    def learns(self) -> bool:
        """Whether anything is optimized by gradient."""
        return self.epochs > 0 and bool(self.learned_parts)

    @property
    def sparse(self) -> SparseAttention | None:
        """Its attention where that is sparse, else None."""
        return self.attention if self.attention.density < 1 else None

    @property
    def needs_activations(self) -> bool:
        """Whether the calibration of its blocks reads calibration data at all."""
        reads = self.learns or self.rounding == "gptq" or self.channel_scale == "smoothquant"
        return reads or self.sparse is not None

    @property
    def distills_attention(self) -> bool:
        """Whether the block loss has attention terms."""
        return self.learns and self.attention_distillation != "none"

    @property
    def is_refined(self) -> bool:
        """Whether it has a unit in the stage refinement."""
        return self.drift_repair or self.velocity_correction or self.attention.measures_residual

    def num_protected_steps(self, num_steps: int) -> int:
        """Of a generation with `num_steps`; a share is rounded, and protects one step at least."""
        if 0 < self.protected_steps < 1:
            return max(1, round(self.protected_steps * num_steps))
        return int(self.protected_steps)

    def calibration_values(self, blocks: tuple[str, ...]) -> dict[str, Any]:
        """JSON values that decide how the blocks of a model are calibrated, for fingerprints; `blocks` in model order."""
        values = {name: value for name, value in self.to_dict().items() if name not in _CALIBRATION_IGNORES}
        sparse = self.sparse
        if sparse is None:
            return {**values, "sparse": None}
        dense = list(blocks[: sparse.dense_layers])
        return {**values, "sparse": {"density": sparse.density, "dense_blocks": dense, "attention": sparse.calibrate}}

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.preset)
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ValueError(f"method name {self.name!r}: lower-case letters, digits, - and _ only (it names a folder)")
        if self.name in RESERVED_NAMES:
            raise ValueError(f"method name {self.name!r} is taken: the evaluation calls the 16-bit model so")
        if problems := self.impossible_values() or self._contradictions():
            raise ValueError(f"method {self.name}: {'; '.join(problems)}")

    def _contradictions(self) -> list[str]:
        found, learned = [], self.learned_parts
        if learned and self.epochs == 0:
            found.append(f"epochs is 0, but {', '.join(learned)} = learned; set epochs to 1 or more")
        if self.attention_distillation != "none" and not learned:
            found.append(
                f"attention_distillation {self.attention_distillation} needs something to learn; set "
                "channel_scale, rotation or clip to learned, or attention_distillation to none"
            )
        if self.tokens_per_step < 1 and not learned:
            found.append(
                f"tokens_per_step {self.tokens_per_step:g} needs something to learn; set channel_scale, "
                "rotation or clip to learned, or tokens_per_step to 1"
            )
        elif self.tokens_per_step < 1 and self.sparse is not None and self.sparse.calibrate != "dense":
            found.append(
                f"tokens_per_step is {self.tokens_per_step:g}, but blocks are calibrated against "
                f"{self.attention.calibrate} attention, which is computed for all tokens or none; set attention.calibrate to "
                "dense, attention.density to 1, or tokens_per_step to 1"
            )
        steps, bits = self.protected_steps, self.protected_activation_bits
        if steps < 0 or (steps >= 1 and steps != int(steps)):
            found.append(f"protected_steps is {steps}; a whole number of steps, or a share below 1")
        if not (4 <= bits <= 8 or bits == 16):
            found.append(f"protected_activation_bits is {bits}; 4 to 8, or 16")
        for name in ("lambda_global", "lambda_local"):
            value = getattr(self, name)
            if value != "auto" and not value > 0:
                found.append(f"{name} is {value:g}; above 0, or auto")
        if self.solve == "asymmetric" and self.rounding != "gptq":
            found.append(f"solve asymmetric needs rounding gptq, but rounding is {self.rounding}")
        return found


_S2Q = Recipe(
    preset="s2q", channel_scale="learned", rotation="learned", clip="learned", rounding="gptq", token_weights=True, epochs=15
)  # fmt: skip
_OURS = replace(
    _S2Q, preset="reelquant", name="", epochs=5, weight_layout="two_level", protected_steps=0.25
)  # fmt: skip
_QUANTSPARSE = SparseAttention(density=0.25, dense_steps=1, residual=Residual(order=1))
_EARLY_DENSE = SparseAttention(
    density=0.25,
    dense_steps=5,
    refresh_steps="placed",
    residual=Residual(order=1, gain="calibrated", storage="low_rank_int8"),
)
PRESETS: dict[str, Recipe] = {
    recipe.preset: recipe
    for recipe in (
        Recipe(),
        Recipe(preset="smoothquant", channel_scale="smoothquant"),
        Recipe(preset="quarot", rotation="hadamard"),
        Recipe(preset="gptq", rounding="gptq"),
        _S2Q,
        replace(
            _S2Q, preset="quantsparse", name="", rounding="nearest", token_weights=False, attention_distillation="both",
            attention=_QUANTSPARSE,
        ),
        _OURS,
        replace(_OURS, preset="s2q_quantsparse", name="", attention=_EARLY_DENSE),
    )
}  # fmt: skip
"""`rtn`: round to nearest. `smoothquant`: its channel scale. `quarot`: Hadamard rotation. `gptq`: error feedback.
`s2q`: S²Q-VDiT, everything learned, GPTQ at the end. `quantsparse`: QuantSparse, everything learned with attention
distillation, sparse attention with its residual cache; the first step is dense and the residual of first order, as the second
order of the paper's equation 14 measured worse (docs/results_appendix.md). `reelquant`: ours, S²Q-VDiT with two-level weights,
protected first steps and 5 epochs. `s2q_quantsparse`: `reelquant` with sparse attention, first five steps dense, a residual of
first order, kept in 8 bits, with its refreshes placed and its gains measured in calibration. Configurations of the papers'
experiments, samples and all, are in configs/papers."""
