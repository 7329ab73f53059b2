"""A block that is calibrated for sparse attention: its head kinds, and the attention it computes meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.attention.head_kind import band_errors, sampled_rows
from reelquant.calibration.block_call import BlockCall, Constants
from reelquant.ops.band_attention.op import band_attention, dense_attention
from reelquant.tokens import TokenLayout, band_width


class CalibrationCore:
    """Attention core of a block under calibration: the band of each head, and the residual that the sample brings along."""

    def __init__(self, kinds: str, density: float) -> None:
        self._kinds, self._density = kinds, density
        self._layout: TokenLayout | None = None
        self._residual: Tensor | None = None

    def prepare(self, constants: Constants) -> None:
        """Takes token grid and residual of the sample that is about to run."""
        self._layout, self._residual = constants.layout, constants.attention_residual

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
    call: BlockCall, block: nn.Module, samples: Sequence[Any], *, kinds: str, density: float
) -> None:
    """Gives every sample what the band misses of the full-precision block's attention `[H, L, D]`, where its samples lie."""
    for sample in samples:
        here = sample.at(block)
        layout: TokenLayout = here.constants.layout
        width = band_width(layout, density)
        found: list[Tensor] = []

        def observe(
            q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout = layout, width: int = width, into: Any = found
        ) -> None:
            banded = band_attention(q, k, v, kinds=kinds, layout=layout, width=width)
            into.append(dense_attention(q, k, v) - banded)

        with torch.no_grad(), call.watch_attention(block, observe):
            call(block, here.reference, here.constants)
        residual = found[0].to(sample.home, found[0].dtype)
        sample.constants = replace(sample.constants, attention_residual=residual)


def drop_missed_attention(samples: Sequence[Any]) -> None:
    """Takes the residuals of `keep_missed_attention` back: the next block has its own."""
    for sample in samples:
        sample.constants = replace(sample.constants, attention_residual=None)
