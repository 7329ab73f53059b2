"""Normalization and rotary embedding of queries and keys in plain torch: what defines the result of the kernel.

Shapes: L tokens, the first n of them of the video; H heads of size D.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 4096
"""Tokens at a time: bounds the float32 intermediates."""


def qk_norm_rope_reference(
    qkv: Tensor,
    *,
    num_heads: int,
    norm_weights: tuple[Tensor, Tensor],
    text_norm_weights: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """See `op.qk_norm_rope`: changes `qkv` in place. Float32 between the one reading and the one writing."""
    head_dim = len(norm_weights[0])
    num_video = len(rotary[0])
    width = num_heads * head_dim
    for side in range(2):
        part = qkv[:, side * width : (side + 1) * width]
        for start in range(0, len(qkv), TILE_ROWS):
            rows = slice(start, start + TILE_ROWS)
            x = part[rows].unflatten(1, (num_heads, head_dim)).float()
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            video = max(0, min(num_video - start, len(x)))
            x[:video] *= norm_weights[side].float()
            x[video:] *= text_norm_weights[side].float()
            cos, sin = (table[start : start + video, None].float() for table in rotary)
            x[:video] = x[:video] * cos + turned(x[:video]) * sin
            part[rows] = x.flatten(1).to(qkv.dtype)
    return qkv


def turned(x: Tensor) -> Tensor:
    """Every pair (a, b) of neighbours in the last dimension becomes (-b, a)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)
