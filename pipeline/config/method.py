"""Calibration methods: presets, and what can be changed in them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config.section import Section

Preset = Literal["rtn", "smoothquant", "quarot", "gptq", "s2q", "quantsparse", "reelquant", "s2q_quantsparse"]

_NOTHING: dict[str, Any] = {
    "channel_scale": "none",
    "rotation": "none",
    "clip": "none",
    "rounding": "nearest",
    "solve": "plain",
    "token_weights": False,
    "epochs": 0,
}
_S2Q: dict[str, Any] = {
    "channel_scale": "learned",
    "rotation": "learned",
    "clip": "learned",
    "rounding": "gptq",
    "solve": "plain",
    "token_weights": True,
    "epochs": 15,
}
_QUANTSPARSE: dict[str, Any] = {
    "attention_distillation": "both",
    "attention": {"density": 0.25, "dense_steps": 1, "residual": {"order": 1}},
}
_EARLY_DENSE: dict[str, Any] = {
    "attention": {
        "density": 0.25,
        "dense_steps": 5,
        "refresh_steps": "placed",
        "residual": {"order": 1, "gain": "calibrated", "storage": "low_rank_int8"},
    }
}
_OURS: dict[str, Any] = {**_S2Q, "epochs": 5, "weight_layout": "two_level", "protected_steps": 0.25}
PRESETS: dict[str, dict[str, Any]] = {
    "rtn": _NOTHING,
    "smoothquant": {**_NOTHING, "channel_scale": "smoothquant"},
    "quarot": {**_NOTHING, "rotation": "hadamard"},
    "gptq": {**_NOTHING, "rounding": "gptq"},
    "s2q": _S2Q,
    "quantsparse": {**_S2Q, "rounding": "nearest", "token_weights": False, **_QUANTSPARSE},
    "reelquant": _OURS,
    "s2q_quantsparse": {**_OURS, **_EARLY_DENSE},
}
"""`rtn`: round to nearest. `smoothquant`: its channel scale. `quarot`: Hadamard rotation. `gptq`: error feedback.
`s2q`: S²Q-VDiT, everything learned, GPTQ at the end. `quantsparse`: QuantSparse, everything learned with attention
distillation, sparse attention with its residual cache; the first step is dense and the residual of first order, as the second
order of the paper's equation 14 measured worse (docs/results_appendix.md). `reelquant`: ours, S²Q-VDiT with two-level weights,
protected first steps and 5 epochs. `s2q_quantsparse`: `reelquant` with sparse attention, first five steps dense, a residual of
first order, kept in 8 bits, with its refreshes placed and its gains measured in calibration. Configurations of the papers'
experiments, samples and all, are in configs/papers."""


_RESERVED = ("full_precision", "noise_floor")


class ResidualConfig(Section):
    """Residual cache of sparse attention (SSAR, QuantSparse §3.3)."""

    ADDED = frozenset({"gain"})

    order: Literal[0, 1, 2] = 2
    """0 for none; 1 adds what the band missed at the last refresh, 2 also how that changed since the refresh before."""
    rank: int | None = Field(default=16, ge=1)
    """Of the projection (QuantSparse: 16); null for none."""
    extrapolation: Literal["constant", "linear", "adjacent"] = "linear"
    """Of the change, with order 2: `linear` scales it with the steps since the refresh; `constant` adds it whole
    (QuantSparse, equation 14), which measured 1 dB worse on the small model. `adjacent` adds the change since the step before
    the refresh (Proposition 3.3) where that step was dense, as after `dense_steps`; later refreshes are then of order 1. It
    computes the band at the dense first steps too."""
    storage: Literal["full", "low_rank", "low_rank_int8"] = "low_rank"
    """`full` keeps whole residuals and projects the change only, as the paper's formula says; `low_rank` keeps factors,
    `low_rank_int8` their long side in 8 bits: half the memory."""

    gain: tuple[Annotated[float, Field(ge=0, le=2)], ...] | Literal["calibrated"] | None = None
    """With order 1: factors on the residual 1, 2, ... steps after its refresh, the last one for all later steps; it costs
    nothing. `calibrated`: by least squares on the first calibration trajectories. null: 1."""

    @model_validator(mode="after")
    def _check(self) -> ResidualConfig:
        if self.gain == ():
            raise ValueError("residual.gain is empty; give factors, one a lag, calibrated, or null")
        if self.gain is not None and self.order != 1:
            raise ValueError(
                f"residual.gain damps a residual of order 1, but residual.order is {self.order}; set order: 1, or gain: null"
            )
        if self.storage != "full" and self.rank is None and self.order > 0:
            raise ValueError(f"residual.storage {self.storage} needs residual.rank; give a rank, or set storage: full")
        return self


class AttentionConfig(Section):
    """Sparse attention (method §6)."""

    ADDED = frozenset({"refresh_steps"})

    density: float = Field(default=1.0, gt=0, le=1)
    """Share of the attention map that a sparse step visits; 1 is dense."""
    head_kinds: Literal["offline", "online"] = "offline"
    """Spatial and temporal heads: found once from the calibration samples, or anew while generating."""
    dense_steps: int = Field(default=0, ge=0)
    """First steps that run dense."""
    dense_layers: int = Field(default=0, ge=0)
    """First blocks that always run dense."""
    interval: int = Field(default=5, ge=1)
    """Steps from one refresh to the next (QuantSparse: 5); a refresh runs dense."""
    refresh_steps: tuple[Annotated[int, Field(ge=0)], ...] | Literal["placed"] | None = None
    """Steps that refresh, ascending, in place of the interval; the first step that is not dense always does. Stored as noise
    levels, so that generations with other numbers of steps refresh at the same places. `placed`: as many as by the interval,
    where the residual drifts most on the first calibration trajectories; that weighs all steps alike, and leaves less error of
    the attention, not always of the video, which early steps decide. null: by the interval."""
    residual: ResidualConfig = ResidualConfig()
    precision: Literal["full", "int8_16", "int8_fp8"] = "full"
    """Of attention's products while generating, dense steps too: that of the model; INT8 scores; INT8 scores with e4m3 weights
    and values, the fastest on Hopper. CUDA GPUs before Hopper run in full precision."""
    calibrate: Literal["sparse", "corrected", "dense"] = "dense"
    """What distillation sees: dense attention, as in QuantSparse's Algorithm 1; the band alone; or the band and what it misses
    of the full-precision attention, as right after a refresh."""

    @property
    def measures_residual(self) -> bool:
        """Whether the drift of its residual is measured in calibration."""
        return self.density < 1 and (self.residual.gain == "calibrated" or self.refresh_steps == "placed")

    @model_validator(mode="after")
    def _check(self) -> AttentionConfig:
        steps = self.refresh_steps
        if steps is not None and self.residual.order == 0:
            raise ValueError(
                f"attention.refresh_steps is {steps!r}, but residual.order is 0: there is nothing to refresh; set it to 1 or "
                "2, or refresh_steps: null"
            )
        if isinstance(steps, tuple) and (not steps or list(steps) != sorted(set(steps))):
            raise ValueError(f"attention.refresh_steps is {list(steps)}; steps in ascending order, each once, or null")
        if self.measures_residual and self.head_kinds == "online":
            raise ValueError(
                f"attention.head_kinds is online, but residual.gain is {self.residual.gain!r} and refresh_steps {steps!r}: the "
                "residual is measured with each head's kind; set head_kinds: offline, or give gain and refresh_steps"
            )
        return self


def _drop_measured(merged: dict[str, Any], given: dict[str, Any]) -> None:
    """Takes from `merged` the gains and places that the preset has measured for its residual, unless they are `given`, where
    the section has a residual of another order or finds the kinds of heads while generating."""
    if merged.get("head_kinds") != "online" and merged["residual"].get("order", 1) == 1:
        return
    if "gain" not in given.get("residual", {}):
        merged["residual"].pop("gain", None)
    if "refresh_steps" not in given:
        merged.pop("refresh_steps", None)


class MethodConfig(BaseModel):
    """A preset and its changes; a field left out takes the preset's value."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    preset: Preset = "reelquant"
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
    """GPTQ's targets: `asymmetric` aims at the full-precision stream's outputs (method §9.2)."""
    token_weights: bool = False
    """Weight tokens by the attention they receive (S²Q-VDiT §3.3)."""
    weight_layout: Literal["per_channel", "two_level"] = "per_channel"
    """`two_level`: integer scales of groups of 64 inputs on top (method §9.1); 0.125 bits more per weight."""
    epochs: int = Field(default=0, ge=0)
    """Passes over the samples per block (both papers: 15; 5 in our presets, with which they were measured)."""
    learning_rate_transform: float = Field(default=5e-3, gt=0)
    """Of channel scale and rotation."""
    learning_rate_clip: float = Field(default=5e-2, gt=0)
    """Of clip thresholds."""
    lambda_min: float = Field(default=0.5, ge=0, le=1)
    """Smallest token weight."""
    smoothing_alpha: float = Field(default=0.5, ge=0, le=1)
    """SmoothQuant's exponent."""
    rotation_block: Literal[16, 32, 64, 128] = 128
    """Largest side of the rotation's blocks. 128 takes 0.1 % of a large model's bytes; models of a few MB want 64 or less."""
    damping: float = Field(default=0.01, gt=0)
    """Of GPTQ, a share of the Hessian's diagonal (`reelquant.quantization.gptq`)."""

    attention_distillation: Literal["none", "global", "local", "both"] = "none"
    """Attention terms of the block loss (MSAD, QuantSparse §3.2)."""
    lambda_global: float | Literal["auto"] = "auto"
    """Weight of the pooled term; `auto`: as large as the block's error at the first step."""
    lambda_local: float | Literal["auto"] = "auto"
    """Weight of the salient queries' term."""
    pool_size: int = Field(default=128, ge=1)
    """Consecutive tokens averaged for the global term."""
    num_salient_tokens: int = Field(default=256, ge=1)
    """Queries of the local term."""
    tokens_per_step: float = Field(default=1.0, gt=0, le=1)
    """Share of the video tokens from which a learning step estimates the block's error, drawn anew in every step; below 1 a
    step is faster (at 720p most of it is attention, which then has fewer queries) and losses of epochs are estimates. The
    losses before and after calibration, and GPTQ, see all tokens."""
    attention: AttentionConfig = AttentionConfig()
    protected_steps: int | float = Field(default=0, ge=0)
    """First steps with finer activations (method §9.3); below 1, their share of all steps."""
    protected_activation_bits: int = 8
    """Activation bits of the protected steps; 8 cost nothing where fewer run in INT8 containers."""
    drift_repair: bool = False
    """A last, sequential pass: gain and bias of every block's output layers against the drift of all blocks before."""
    velocity_correction: bool = False
    """Gain and bias of the model's output per step and latent channel (method §9.4)."""

    @property
    def needs_activations(self) -> bool:
        """Whether its distillation reads calibration data: the rule of `Recipe.needs_activations`, without torch."""
        learns = self.epochs > 0 and "learned" in (self.channel_scale, self.rotation, self.clip)
        reads = learns or self.rounding == "gptq" or self.channel_scale == "smoothquant"
        return reads or self.attention.density < 1

    @property
    def is_refined(self) -> bool:
        """Whether it has a unit in the stage refinement."""
        return self.drift_repair or self.velocity_correction or self.attention.measures_residual

    def num_protected_steps(self, num_steps: int) -> int:
        """Of a generation with `num_steps`; a share is rounded, and protects one step at least."""
        if 0 < self.protected_steps < 1:
            return max(1, round(self.protected_steps * num_steps))
        return int(self.protected_steps)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"preset": values}
        if not isinstance(values, dict):
            return values
        attention = values.get("attention") or {}
        if not isinstance(attention, dict):
            raise ValueError(f"method attention is {attention!r}; give a section such as {{density: 0.25}}")
        density = attention.get("density", 1.0)
        sparse = isinstance(density, int | float) and density < 1
        preset = values.get("preset", "s2q_quantsparse" if sparse else "reelquant")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"method preset {preset!r} is unknown: one of {', '.join(PRESETS)}")
        start = PRESETS[preset]
        merged = {**start.get("attention", {}), **attention}
        residual = [section.get("residual", {}) for section in (start.get("attention", {}), attention)]
        if all(isinstance(part, dict) for part in residual):
            merged["residual"] = {**residual[0], **residual[1]}
            _drop_measured(merged, attention)
        return {"name": preset, "preset": preset, **start, **values, "attention": merged}

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ValueError(f"method name {self.name!r}: lower-case letters, digits, - and _ only (it names a folder)")
        if self.name in _RESERVED:
            raise ValueError(f"method name {self.name!r} is taken: the evaluation calls the 16-bit model so")
        learned = [f for f in ("channel_scale", "rotation", "clip") if getattr(self, f) == "learned"]
        if learned and self.epochs == 0:
            raise ValueError(
                f"method {self.name}: epochs is 0, but {', '.join(learned)} = learned; set epochs to 1 or more"
            )
        if self.attention_distillation != "none" and not learned:
            raise ValueError(
                f"method {self.name}: attention_distillation {self.attention_distillation} needs something to learn; set "
                "channel_scale, rotation or clip to learned, or attention_distillation to none"
            )
        if self.tokens_per_step < 1:
            self._check_tokens_per_step(learns=bool(learned))
        if self.protected_steps >= 1 and self.protected_steps != int(self.protected_steps):
            raise ValueError(
                f"method {self.name}: protected_steps is {self.protected_steps}; a whole number of steps, or a share below 1"
            )
        bits = self.protected_activation_bits
        if not (4 <= bits <= 8 or bits == 16):
            raise ValueError(f"method {self.name}: protected_activation_bits is {bits}; 4 to 8, or 16")
        for name in ("lambda_global", "lambda_local"):
            value = getattr(self, name)
            if value != "auto" and not value > 0:
                raise ValueError(f"method {self.name}: {name} is {value}; above 0, or auto")
        if self.solve == "asymmetric" and self.rounding != "gptq":
            raise ValueError(
                f"method {self.name}: solve asymmetric needs rounding gptq, but rounding is {self.rounding}"
            )
        return self

    def _check_tokens_per_step(self, *, learns: bool) -> None:
        if not learns:
            raise ValueError(
                f"method {self.name}: tokens_per_step {self.tokens_per_step:g} needs something to learn; set channel_scale, "
                "rotation or clip to learned, or tokens_per_step to 1"
            )
        if self.attention.density < 1 and self.attention.calibrate != "dense":
            raise ValueError(
                f"method {self.name}: tokens_per_step is {self.tokens_per_step:g}, but blocks are calibrated against "
                f"{self.attention.calibrate} attention, which is computed for all tokens or none; set attention.calibrate to "
                "dense, attention.density to 1, or tokens_per_step to 1"
            )
