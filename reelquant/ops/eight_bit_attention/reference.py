"""Attention in 8 bits in plain torch, on any device: what defines the result of the kernels, and the form of what is kept.

    scores  = round(q / s_q) round((k - shift) / s_k)^T s_q s_k / sqrt(D)             INT8, s_q a token, s_k 128 positions
    weights = 256 2^(scores log2(e) - largest of the row), rounded to e4m3            their sum is taken before rounding
    out     = (weights round((v - shift) / s_v)) / sum s_v + shift                    e4m3, s_v and shift a channel

This is SageAttention's scheme (arXiv 2410.02367, 2411.10958), the shift of the keys taken from a sample of tokens: any shift
is right but for rounding. With precision `int8_16` values stay as they are and weights are
rounded to their dtype. A kernel's largest weight so far stands for the row's: its rounding to e4m3 differs where that rises.

Shapes: H heads, L = n + m tokens (n of the video, then m of the text), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import e, log2
from typing import Literal

import torch
from torch import Tensor

from reelquant.ops.architecture import current_stream
from reelquant.ops.token_order import place_major_order
from reelquant.tokens import TokenLayout

Precision = Literal["int8_fp8", "int8_16"]

GROUP = 128
"""Positions that share a key scale; also what video and text are each padded to."""
STRIDE = 8
"""Every how many tokens one counts for the shift of the keys."""
LARGEST = 448.0
"""Of e4m3."""
TILE_SCORES = 2**25
"""Scores that the reference holds at a time, of some queries of one head or of several heads."""


@dataclass(frozen=True)
class KeysValues:
    """Keys and values, quantized and in the order of each head's kind; it serves band and dense attention alike."""

    key_codes: Tensor
    """int8 `[H, P, D]`: P positions, those of the video in the head's order, zeros to a multiple of 128, text, zeros again."""
    key_scale: Tensor
    """float32 `[H, P / 128]`."""
    value_codes: Tensor
    """`[H, D, P]`: e4m3 with places as `kernel.py` says, or 16-bit values at their positions."""
    value_scale: Tensor
    """float32 `[H, D]`."""
    value_shift: Tensor
    """float32 `[H, D]`."""
    kinds: str
    """One letter a head, `s` or `t`."""
    layout: TokenLayout

    @property
    def padded_video(self) -> int:
        """Position of the first text token."""
        return padded(self.layout.num_video)

    @property
    def nbytes(self) -> int:
        tensors = (self.key_codes, self.key_scale, self.value_codes, self.value_scale, self.value_shift)
        return sum(x.nbytes for x in tensors)


def padded(num: int) -> int:
    return -(-num // GROUP) * GROUP


def value_places(num: int, device: torch.device | str = "cpu") -> Tensor:
    """`[num]` int64: the position at every place of the e4m3 values; num is a multiple of 16."""
    place = torch.arange(num, device=device)
    inside = place % 16
    return place - inside + inside % 4 // 2 * 8 + inside // 4 * 2 + inside % 2


def quantize_keys_values_reference(
    k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, precision: Precision
) -> KeysValues:
    """See `op.quantize_keys_values`."""
    wide_k, wide_v = k.float(), v.float()
    length = padded(layout.num_video) + padded(layout.num_text)
    places = _places(kinds, layout, k.device, current_stream(k.device))
    key_shift, value_shift = wide_k[:, ::STRIDE].mean(1), wide_v.mean(1)
    keys = _placed(wide_k - key_shift[:, None], places, length)
    grouped = keys.unflatten(1, (-1, GROUP))
    largest = grouped.abs().amax((2, 3)).clamp_min(1e-12)
    key_scale = largest / 127
    key_codes = (grouped * (127 / largest)[:, :, None, None]).round().to(torch.int8).flatten(1, 2)
    if precision == "int8_16":
        ones = torch.ones_like(value_shift)
        codes = _placed(v, places, length).transpose(1, 2).contiguous()
        return KeysValues(key_codes, key_scale, codes, ones, torch.zeros_like(ones), kinds, layout)
    shifted = wide_v - value_shift[:, None]
    value_scale = shifted.abs().amax(1).clamp_min(1e-12) / LARGEST
    scaled = _placed((shifted * (1 / value_scale)[:, None]).clamp(-LARGEST, LARGEST), places, length)
    scaled = scaled[:, value_places(scaled.shape[1], k.device)]
    codes = scaled.transpose(1, 2).contiguous().to(torch.float8_e4m3fn)
    return KeysValues(key_codes, key_scale, codes, value_scale, value_shift, kinds, layout)


def quantize_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (integers in float32) `[H, L, D]` and their scale `[H, L, 1]`."""
    largest = q.float().abs().amax(2, keepdim=True).clamp_min(1e-12)
    return (q.float() * (127 / largest)).round(), largest / 127


def eight_bit_attention_reference(q: Tensor, keys_values: KeysValues, *, width: int) -> Tensor:
    """See `op.eight_bit_attention`, without corrections. Holds about `TILE_SCORES` scores at a time."""
    kv, layout = keys_values, keys_values.layout
    position = torch.arange(kv.key_codes.shape[1], device=q.device)
    is_text = (position >= kv.padded_video) & (position < kv.padded_video + layout.num_text)
    is_video = position < layout.num_video
    codes, scale = quantize_queries(q)
    places = _places(kv.kinds, layout, q.device, current_stream(q.device))
    tile_rows = max(1, min(layout.num_tokens, TILE_SCORES // len(position)))
    tile_heads = max(1, TILE_SCORES // (len(position) * tile_rows))
    out = torch.empty_like(q)
    for start in range(0, len(kv.kinds), tile_heads):
        heads = slice(start, start + tile_heads)
        keys, values = kv.key_codes[heads].float().mT, kv.value_codes[heads].float().mT
        if kv.value_codes.dtype == torch.float8_e4m3fn:
            at_places = value_places(values.shape[1], q.device)
            values = torch.empty_like(values).index_copy_(1, at_places, values)
        key_scale = kv.key_scale[heads].repeat_interleave(GROUP, dim=1)[:, None] * (q.shape[2] ** -0.5 * log2(e))
        for first in range(0, layout.num_tokens, tile_rows):
            rows = slice(first, first + tile_rows)
            at = places[heads, rows, None]
            near = (at >= kv.padded_video) | ((at - position).abs() < width)
            scores = codes[heads, rows] @ keys * scale[heads, rows] * key_scale
            scores = scores.masked_fill(~((near & is_video) | is_text), float("-inf"))
            weights = torch.exp2(scores - scores.amax(2, keepdim=True) + 8)
            result = weights.to(kv.value_codes.dtype).float() @ values / weights.sum(2, keepdim=True)
            out[heads, rows] = (result * kv.value_scale[heads, None] + kv.value_shift[heads, None]).to(q.dtype)
    return out


@lru_cache(maxsize=64)
def _places(kinds: str, layout: TokenLayout, device: torch.device, _stream: int) -> Tensor:
    """`[H, L]` int64: the position of every token of every head."""
    with torch.inference_mode(False):
        return torch.stack([_positions(kind, layout, device) for kind in kinds])


def _positions(kind: str, layout: TokenLayout, device: torch.device | str) -> Tensor:
    """`[L]` int64: the position of every token."""
    video = torch.arange(layout.num_video, device=device)
    if kind == "t":
        video = torch.empty_like(video).index_copy_(0, place_major_order(layout, device), video)
    return torch.cat([video, padded(layout.num_video) + torch.arange(layout.num_text, device=device)])


def _placed(x: Tensor, places: Tensor, length: int) -> Tensor:
    """`[H, L, D]` at its positions `[H, L]`, zeros between: `[H, length, D]`."""
    heads, _, head_dim = x.shape
    out = x.new_zeros(heads, length, head_dim)
    return out.scatter_(1, places[:, :, None].expand(-1, -1, head_dim), x)
