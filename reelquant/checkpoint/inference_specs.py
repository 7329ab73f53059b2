"""Correction of a checkpoint's velocity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class VelocityCorrection:
    """`velocity_correction` of a checkpoint: T steps of the schedule it was fitted on, C latent channels."""

    timesteps: tuple[float, ...]
    """`[T]`, descending, as the scheduler gives them."""
    gain: tuple[tuple[float, ...], ...]
    """`[T][C]`."""
    bias: tuple[tuple[float, ...], ...]
    """`[T][C]`."""

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        widths = {len(row) for row in (*self.gain, *self.bias)}
        if not steps or len(self.gain) != steps or len(self.bias) != steps or len(widths) != 1:
            raise ValueError(
                f"velocity_correction: {steps} timesteps, {len(self.gain)} rows of gain, {len(self.bias)} of bias with "
                f"{sorted(widths)} channels; all must agree"
            )
        values = torch.tensor([self.timesteps, *zip(*self.gain, strict=True), *zip(*self.bias, strict=True)])
        if not bool(values.isfinite().all()):
            raise ValueError("velocity_correction: holds values that are not finite")

    def at(self, timestep: float) -> tuple[Tensor, Tensor]:
        """Gain and bias `[C]` float32 at `timestep`: linear between the fitted steps, the ends' beyond them."""
        times = torch.tensor(self.timesteps, dtype=torch.float64)
        gain, bias = torch.tensor(self.gain), torch.tensor(self.bias)
        above = int((times >= timestep).sum())
        if above == 0 or above == len(times):
            index = 0 if above == 0 else len(times) - 1
            return gain[index], bias[index]
        first, second = times[above - 1], times[above]
        share = float((first - timestep) / (first - second))
        return torch.lerp(gain[above - 1], gain[above], share), torch.lerp(bias[above - 1], bias[above], share)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VelocityCorrection:
        """From the JSON values of `to_dict`.

        Raises:
            ValueError: a key is unknown or missing, or the values do not fit each other.
        """
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(f"velocity_correction: must have {sorted(names)}, got {sorted(values)}")
        return cls(
            tuple(values["timesteps"]),
            tuple(tuple(row) for row in values["gain"]),
            tuple(tuple(row) for row in values["bias"]),
        )
