"""A block that is calibrated for sparse attention: its head kinds, and the attention it computes meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.attention.head_kind import band_errors, sampled_rows
from reelquant.ops.band_attention.op import band_attention, dense_attention
from reelquant.tokens import TokenLayout, band_width


class CalibrationCore:
    """Attention core of a block under calibration: the band of each head, and the residual that the sample brings along."""

    def __init__(self, kinds: str, density: float) -> None:
        self._kinds, self._density = kinds, density
        self._layout: TokenLayout | None = None
        self._residual: Tensor | None = None

    def prepare(self, conditioning: Any) -> None:
        """Takes token grid and residual of the sample that is about to run, from the family's `Conditioning`."""
        self._layout, self._residual = conditioning.layout, conditioning.attention_residual

    def __call__(self, _item: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[H, L, D]` three times -> `[H, L, D]`."""
        assert self._layout is not None
        width = band_width(self._layout, self._density)
        out = band_attention(q, k, v, kinds=self._kinds, layout=self._layout, width=width)
        return out if self._residual is None else out + self._residual.to(out.dtype)


def sample_band_errors(layout: TokenLayout, density: float, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`head_kind.band_errors` `[H, 2]` of one sample's full-precision attention, at rows over its whole sequence."""
    q, k, v = qkv
    rows = sampled_rows(layout, device=q.device)
    return band_errors(q, k, v, layout=layout, width=band_width(layout, density), rows=rows)


def keep_missed_attention(
    family: ModuleType, block: nn.Module, samples: Sequence[Any], *, kinds: str, density: float
) -> None:
    """Gives every sample what the band misses of the full-precision block's attention `[H, L, D]`, where its samples lie."""
    for sample in samples:
        here = sample.at(block)
        layout: TokenLayout = here.conditioning.layout
        width = band_width(layout, density)
        found: list[Tensor] = []

        def observe(
            q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout = layout, width: int = width, into: Any = found
        ) -> None:
            banded = band_attention(q, k, v, kinds=kinds, layout=layout, width=width)
            into.append(dense_attention(q, k, v) - banded)

        with torch.no_grad(), family.watch_attention(block, observe):
            family.call_block(block, here.reference, here.conditioning)
        residual = found[0].to(sample.reference.device, sample.reference.dtype)
        sample.conditioning = replace(sample.conditioning, attention_residual=residual)


def drop_missed_attention(samples: Sequence[Any]) -> None:
    """Takes the residuals of `keep_missed_attention` back: the next block has its own."""
    for sample in samples:
        sample.conditioning = replace(sample.conditioning, attention_residual=None)
