"""Which heads are spatial and which temporal (method §6): the kind whose band leaves more of the head's own output.

Shapes: H heads, L tokens (video, then text), D head size, R sampled query rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.token_order import place_major_positions
from reelquant.tokens import TokenLayout

NUM_ROWS = 64
"""Sampled query rows, as many as Sparse VideoGen takes; here they are spread over the whole video."""
TILE_BYTES = 256 * 2**20


def sampled_rows(layout: TokenLayout, num_rows: int = NUM_ROWS, device: torch.device | str = "cpu") -> Tensor:
    """`[R]` int64: video tokens spread evenly over the whole sequence, so that every frame that is not dense has its share."""
    num_video = layout.banded.num_video
    count = min(num_rows, num_video)
    rows = torch.arange(count, device=device, dtype=torch.float64) + 0.5
    return (rows * num_video / count).long() + layout.num_dense


def row_masks(layout: TokenLayout, rows: Tensor, width: int) -> Tensor:
    """What the band leaves of some rows, bool `[2, R, L]`: spatial, temporal; on the device of `rows`.

    Args:
        rows: `[R]` indices of video tokens that are not of dense frames.
    """
    first, layout = layout.num_dense, layout.banded
    n, length, rows = layout.num_video, layout.num_tokens, rows - first
    column = torch.arange(length, device=rows.device)
    masks = torch.stack(
        [_near(column[:n], rows, width), _near(place_major_positions(layout, rows.device), rows, width)]
    )
    text = (column >= n)[n:]
    return torch.cat([masks, text.expand(2, len(rows), length - n)], dim=2).roll(first, dims=2)


def band_errors(q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, width: int, rows: Tensor) -> Tensor:
    """Relative error of the sampled rows' output under each kind of mask.

    Args:
        q, k, v: `[H, L, D]`, after normalization and rotary embedding.
        rows: `[R]` indices of video tokens.

    Returns: float32 `[H, 2]`: `||o_kind - o_full||² / ||o_full||²` for spatial, temporal. No gradient.
    """
    length, masks = layout.num_tokens, row_masks(layout, rows, width)
    heads_a_tile = max(1, TILE_BYTES // (4 * len(rows) * length))
    errors = []
    with torch.no_grad():
        for start in range(0, len(q), heads_a_tile):
            part = slice(start, start + heads_a_tile)
            scores = q[part, rows].float() @ k[part].float().transpose(1, 2) * q.shape[2] ** -0.5
            weights = (scores - scores.amax(2, keepdim=True)).exp_()
            values = v[part].float()
            full = weights @ values / weights.sum(2, keepdim=True)
            norm = full.square().sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
            kinds = []
            for mask in masks:
                kept = weights * mask
                banded = kept @ values / kept.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
                kinds.append((banded - full).square().sum((1, 2)) / norm)
            errors.append(torch.stack(kinds, dim=1))
    return torch.cat(errors)


def kinds_of(errors: Tensor) -> str:
    """One letter a head from errors `[H, 2]` (summed over samples): `s` or `t`, spatial where they tie."""
    return "".join("t" if temporal < spatial else "s" for spatial, temporal in errors.tolist())


def _near(positions: Tensor, rows: Tensor, width: int) -> Tensor:
    return (positions[rows].unsqueeze(1) - positions.unsqueeze(0)).abs() < width
