"""Integer grids of a weight matrix: what a code of `[out, in]` stands for.

per_channel   weight = code * scale[out]
two_level     weight = (code * group_scale[out, in / 64]) * scale[out]

In the two-level grid both factors in parentheses are integers and their product is exactly an INT8 number: a plain INT8
matrix product with a per-channel scale runs it (the idea of QServe, arXiv 2405.04532, and LiquidGEMM, arXiv 2509.01229;
here symmetric). An 8-bit group scale per 64 weights costs 0.125 bit a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant.ops.fake_quantization import op
from reelquant.ops.fake_quantization.reference import (
    GROUP_SIZE,
    fit_group_scale,
    in_groups,
    shared_scale,
    two_level_scale,
)
from reelquant.quantization.quantizer import fake_quantize, max_code

__all__ = ["GROUP_SIZE", "WEIGHT_LAYOUTS", "WeightGrid", "fake_quantize_weight", "fit_per_channel", "fit_two_level"]

WEIGHT_LAYOUTS = ("per_channel", "two_level")


@dataclass(frozen=True)
class WeightGrid:
    """The grid of one weight matrix `[out, in]`; made by `fit_per_channel` or `fit_two_level`."""

    scale: Tensor
    """float32 [out, 1], positive."""
    group_scale: Tensor | None
    """uint8 [out, ceil(in / group_size)], 1..127 // max_code(bits); None: per-channel."""
    bits: int
    """2..8."""
    group_size: int = GROUP_SIZE
    """Inputs that share one group scale; the last group may be shorter."""

    def column_scale(self, in_features: int) -> Tensor:
        """float32 [out, in_features]: the step of every single weight (a broadcast view when per-channel)."""
        if self.group_scale is None:
            return self.scale.expand(-1, in_features)
        return self._group_columns(in_features) * self.scale

    def round(self, weight: Tensor) -> Tensor:
        """Nearest codes of `weight` [out, in]: int8 in +-max_code(bits)."""
        self._check_rows("weight", weight)
        largest = max_code(self.bits)
        codes = (weight.float() / self.column_scale(weight.shape[1])).round_()
        return codes.clamp_(-largest, largest).to(torch.int8)

    def expand(self, codes: Tensor) -> Tensor:
        """int8 [out, in]: `codes` times their group scales, exact; what the INT8 matrix product multiplies by `scale`.

        `codes` must lie within +-max_code(bits) (what `round` and GPTQ give); larger ones would wrap around.
        """
        self._check_rows("codes", codes)
        if self.group_scale is None:
            return codes
        return codes * self._group_columns(codes.shape[1]).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """float32 [out, in]: `expand(codes) * scale`."""
        return self.expand(codes).float() * self.scale

    def _group_columns(self, in_features: int) -> Tensor:
        assert self.group_scale is not None
        num_groups = -(-in_features // self.group_size)
        if self.group_scale.shape[1] != num_groups:
            raise ValueError(
                f"{in_features} inputs in groups of {self.group_size} need {num_groups} group scales a row, "
                f"this grid has {self.group_scale.shape[1]}"
            )
        return self.group_scale.repeat_interleave(self.group_size, dim=1)[:, :in_features]

    def _check_rows(self, name: str, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != self.scale.shape[0]:
            raise ValueError(f"{name} must be [{self.scale.shape[0]}, in], got {tuple(matrix.shape)}")


def fit_per_channel(weight: Tensor, bits: int, clip: float | Tensor = 1.0) -> WeightGrid:
    """Grid with one scale per output channel, `max|row| * clip / max_code(bits)`.

    `weight` [out, in] floating; `clip` a number or [out, 1]. Raises ValueError for other shapes and `bits` not 2..8.
    """
    largest = max_code(bits)
    values = _checked(weight).detach().float()
    return WeightGrid(shared_scale(values, _detached(clip), largest, 1).float(), None, bits)


def fit_two_level(weight: Tensor, bits: int, clip: float | Tensor = 1.0, group_size: int = GROUP_SIZE) -> WeightGrid:
    """Grid of integer group scales under one scale per output channel.

    The channel scale lets the row's largest weight, times `clip`, use the largest group scale, `127 // max_code(bits)`.
    Each group takes the integer next above or next below its own `max|group| * clip`, whichever leaves the smaller
    squared rounding error. Arguments and errors as `fit_per_channel`.
    """
    largest = max_code(bits)
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    values = _checked(weight).detach().float()
    scale = two_level_scale(values, _detached(clip), largest)
    group_scale = fit_group_scale(in_groups(values, group_size), scale, largest)
    return WeightGrid(scale.float(), group_scale.to(torch.uint8), bits, group_size)


def fake_quantize_weight(weight: Tensor, bits: int, clip: float | Tensor, layout: str) -> Tensor:
    """`weight` [out, in] rounded to the grid that `fit_<layout>` would give, in its dtype, differentiable.

    Gradients reach `weight` and a tensor `clip` [out, 1] as in `quantizer.fake_quantize`; the integer group scales are
    refitted at every call and are constants to autograd. Raises ValueError for a `layout` not in WEIGHT_LAYOUTS.
    """
    if layout == "per_channel":
        return fake_quantize(_checked(weight), bits, 1, clip)
    if layout != "two_level":
        raise ValueError(f"no weight layout {layout!r}: there are {', '.join(WEIGHT_LAYOUTS)}")
    return op.fake_quantize_two_level(_checked(weight), clip, max_code(bits), GROUP_SIZE)


def _checked(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"weight must be a floating matrix [out, in], got {weight.dtype} {tuple(weight.shape)}")
    return weight


def _detached(clip: float | Tensor) -> float | Tensor:
    return clip.detach() if isinstance(clip, Tensor) else clip
