"""Band attention in plain torch, on any device: what defines the result of every other implementation.

Shapes: H heads, L = n + m tokens (n of the video, then m of the text), D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reelquant.ops.architecture import current_stream
from reelquant.ops.residual_factorization.reference import head_groups
from reelquant.ops.token_order import place_major_order, place_major_positions
from reelquant.tokens import TokenLayout

SCALED_TOKENS = 128
"""Tokens that share a `row_scale`."""


@dataclass(frozen=True)
class Correction:
    """`scale * rows @ directions^T`, added to the attention of every head after its normalization."""

    rows: Tensor
    """[H, L, r] floating, or int8 codes."""
    directions: Tensor
    """[H, D, r] floating."""
    scale: float = 1.0
    row_scale: Tensor | None = None
    """[H, ceil(L / SCALED_TOKENS), r] bfloat16, contiguous: factors on the rows of so many tokens each, for int8 codes."""

    def decoded_rows(self, heads: slice, dtype: torch.dtype) -> Tensor:
        """[h, L, r] of some heads, with their factors, in `dtype`."""
        return decoded(self.rows[heads], None if self.row_scale is None else self.row_scale[heads], dtype)


def decoded(rows: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`rows` [H, L, r] times their `row_scale`, see `Correction`, in `dtype`."""
    values = rows.to(dtype)
    if row_scale is None:
        return values
    return values * row_scale.to(dtype).repeat_interleave(SCALED_TOKENS, dim=1)[:, : rows.shape[1]]


def band_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int, tile_rows: int
) -> Tensor:
    """See `op.band_attention`. Walks tiles of `tile_rows` queries, each against one contiguous run of keys and the text:
    no mask is larger than a tile, and the backward pass keeps no scores."""
    if width >= layout.num_video:
        return dense_attention(q, k, v)
    found = set(kinds)
    if len(found) == 1:
        return _one_kind(q, k, v, is_temporal="t" in found, layout=layout, width=width, tile_rows=tile_rows)
    out = torch.empty_like(q) if not (torch.is_grad_enabled() and q.requires_grad) else None
    parts: list[tuple[Tensor, Tensor]] = []
    for kind in "st":
        index = heads_of_kind(kinds, kind, torch.int64, q.device, current_stream(q.device))
        selected = (x[index] for x in (q, k, v))
        result = _one_kind(*selected, is_temporal=kind == "t", layout=layout, width=width, tile_rows=tile_rows)
        if out is None:
            parts.append((index, result))
        else:
            out[index] = result
    if out is not None:
        return out
    order = torch.cat([index for index, _ in parts]).argsort()
    return torch.cat([result for _, result in parts])[order]


@lru_cache(maxsize=256)
def heads_of_kind(kinds: str, kind: str, dtype: torch.dtype, device: torch.device, _stream: int) -> Tensor:
    """Indices of the heads of one kind, in `dtype`. Kept, because a copy to a GPU waits for all that the GPU has to do."""
    with torch.inference_mode(False):
        return torch.tensor([head for head, letter in enumerate(kinds) if letter == kind], dtype=dtype).to(device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention `[H, L, D]`."""
    return scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))[0]


def dense_and_band_reference(
    q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """See `op.dense_and_band_attention`: simply both."""
    band = band_attention_reference(q, k, v, kinds=kinds, layout=layout, width=width, tile_rows=tile_rows)
    return dense_attention(q, k, v), band


def corrected(out: Tensor, corrections: Sequence[Correction]) -> Tensor:
    """`out` `[H, L, D]` plus the corrections: sums in float32 or wider, result in the dtype of `out`. Differentiable."""
    if not corrections:
        return out
    parts = []
    for heads in head_groups(out):
        wide = out[heads].to(torch.promote_types(out.dtype, torch.float32))
        for term in corrections:
            rows, directions = term.decoded_rows(heads, wide.dtype), term.directions[heads].to(wide.dtype)
            wide = torch.baddbmm(wide, rows, directions.mT, alpha=term.scale)
        parts.append(wide.to(out.dtype))
    return torch.cat(parts)


def _one_kind(
    q: Tensor, k: Tensor, v: Tensor, *, is_temporal: bool, layout: TokenLayout, width: int, tile_rows: int
) -> Tensor:
    n = layout.num_video
    text_k, text_v = k[:, n:], v[:, n:]
    video = [x[:, :n] for x in (q, k, v)]
    if is_temporal:
        order = place_major_order(layout, q.device)
        video = [x[:, order] for x in video]
    video_q, video_k, video_v = video
    outputs = []
    for start in range(0, n, tile_rows):
        stop = min(n, start + tile_rows)
        low, high = max(0, start - width + 1), min(n, stop + width - 1)
        keys = torch.cat([video_k[:, low:high], text_k], dim=1)
        values = torch.cat([video_v[:, low:high], text_v], dim=1)
        rows = torch.arange(start, stop, device=q.device).unsqueeze(1)
        near = (rows - torch.arange(low, high, device=q.device)).abs() < width
        mask = torch.cat([near, near.new_ones(stop - start, layout.num_text)], dim=1)
        outputs.append(
            scaled_dot_product_attention(
                video_q[:, start:stop].unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask
            )[0]
        )
    out = torch.cat(outputs, dim=1)
    if is_temporal:
        out = out[:, place_major_positions(layout, q.device)]
    if not layout.num_text:
        return out
    return torch.cat([out, dense_attention(q[:, n:], k, v)], dim=1)
