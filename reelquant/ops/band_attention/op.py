"""Band attention: checks, and the choice of an implementation.

| implementation | where | memory |
|---|---|---|
| `reference` | any device | O(L D) and one mask of a tile |
| `flex` | CUDA, through torch's FlexAttention, compiled once a head size and kind of call | O(L D) |

A hand-written kernel becomes another row; callers do not change.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reelquant.families.family import TokenLayout
from reelquant.ops.band_attention.reference import band_attention_reference, dense_attention

__all__ = ["Implementation", "band_attention", "dense_attention"]

Implementation = Literal["auto", "reference", "flex"]

FLEX_TOKENS = 4096
"""From here on `auto` takes FlexAttention on CUDA: below, its compilation costs more than it saves."""
_TILE_ROWS = {"cpu": 128, "cuda": 1024}


def band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kinds: str,
    layout: TokenLayout,
    width: int,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention of every head under its band mask (method §6), text tokens dense.

    Args:
        q, k, v: `[H, L, D]` floating, video tokens frame-major, then text; after normalization and rotary embedding.
        kinds: one letter a head: `s` spatial (band over frame-major order) or `t` temporal (place-major).
        layout: the token grid; `layout.num_tokens` is L.
        width: a token sees `|i - j| < width`; from `num_video` on the mask leaves everything.
        implementation: `auto` chooses by device and length.

    Returns: `[H, L, D]` in the dtype of `q`. Differentiable.
    Raises: ValueError for shapes, kinds or widths that do not fit, or `flex` without CUDA.
    """
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k and v must all be [H, L, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.shape[1] != layout.num_tokens:
        raise ValueError(f"q has {q.shape[1]} tokens, the layout {layout} has {layout.num_tokens}")
    if len(kinds) != q.shape[0] or set(kinds) - {"s", "t"}:
        raise ValueError(f"kinds must be one of s and t for each of {q.shape[0]} heads, got {kinds!r}")
    if width < 1:
        raise ValueError(f"the band's width is {width}; it must be at least 1 token")
    if implementation == "flex" and q.device.type != "cuda":
        raise ValueError(f"implementation flex needs CUDA tensors, these are on {q.device}; use reference or auto")
    on_cuda = q.device.type == "cuda"
    if implementation == "flex" or (implementation == "auto" and on_cuda and layout.num_tokens >= FLEX_TOKENS):
        from reelquant.ops.band_attention.flex import band_attention_flex

        return band_attention_flex(q, k, v, kinds=kinds, layout=layout, width=width)
    temporal = torch.tensor([kind == "t" for kind in kinds], device=q.device)
    rows = _TILE_ROWS.get(q.device.type, 1024)
    return band_attention_reference(q, k, v, temporal=temporal, layout=layout, width=width, tile_rows=rows)
