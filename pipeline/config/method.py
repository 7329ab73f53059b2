"""Calibration methods: presets, and what can be changed in them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Preset = Literal["rtn", "smoothquant", "quarot", "gptq", "s2q"]

_NOTHING: dict[str, Any] = {
    "channel_scale": "none",
    "rotation": "none",
    "clip": "none",
    "rounding": "nearest",
    "solve": "plain",
    "token_weights": False,
    "epochs": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "rtn": _NOTHING,
    "smoothquant": {**_NOTHING, "channel_scale": "smoothquant"},
    "quarot": {**_NOTHING, "rotation": "hadamard"},
    "gptq": {**_NOTHING, "rounding": "gptq"},
    "s2q": {
        "channel_scale": "learned",
        "rotation": "learned",
        "clip": "learned",
        "rounding": "gptq",
        "solve": "plain",
        "token_weights": True,
        "epochs": 15,
    },
}
"""`rtn`: round to nearest. `smoothquant`: its channel scale. `quarot`: Hadamard rotation. `gptq`: error feedback.
`s2q`: S²Q-VDiT, everything learned, GPTQ at the end."""


_RESERVED = ("full_precision",)


class MethodConfig(BaseModel):
    """A preset and its changes; a field left out takes the preset's value."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    preset: Preset = "s2q"
    """Which of the presets to start from."""
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
    """Passes over the samples per block (both papers: 15)."""
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
    """Of GPTQ, relative to the mean of the Hessian's diagonal."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"preset": values}
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "s2q")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"method preset {preset!r} is unknown: one of {', '.join(PRESETS)}")
        return {"name": preset, **PRESETS[preset], **values}

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", self.name):
            raise ValueError(f"method name {self.name!r}: lower-case letters, digits, - and _ only (it names a folder)")
        if self.name in _RESERVED:
            raise ValueError(f"method name {self.name!r} is taken: the evaluation calls the 16-bit model so")
        learned = [f for f in ("channel_scale", "rotation", "clip") if getattr(self, f) == "learned"]
        if learned and self.epochs == 0:
            raise ValueError(
                f"method {self.name}: {', '.join(learned)} is learned, but epochs is 0; set epochs to 1 or more"
            )
        if self.solve == "asymmetric" and self.rounding != "gptq":
            raise ValueError(
                f"method {self.name}: solve asymmetric needs rounding gptq, but rounding is {self.rounding}"
            )
        return self
