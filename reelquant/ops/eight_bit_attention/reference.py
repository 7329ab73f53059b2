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
from math import e, log2
from typing import Literal

import torch
from torch import Tensor

from reelquant.attention.band_mask import place_major_order
from reelquant.families.family import TokenLayout

Precision = Literal["int8_fp8", "int8_16"]

GROUP = 128
"""Positions that share a key scale; also what video and text are each padded to."""
STRIDE = 8
"""Every how many tokens one counts for the shift of the keys."""
LARGEST = 448.0
"""Of e4m3."""


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
    places = torch.stack([_positions(kind, layout, k.device) for kind in kinds])
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


def eight_bit_attention_reference(q: Tensor, keys_values: KeysValues, *, width: int, tile_rows: int) -> Tensor:
    """See `op.eight_bit_attention`, without corrections. Holds scores of `tile_rows` queries of one head at a time."""
    kv, layout = keys_values, keys_values.layout
    position = torch.arange(kv.key_codes.shape[1], device=q.device)
    is_text = (position >= kv.padded_video) & (position < kv.padded_video + layout.num_text)
    is_video = position < layout.num_video
    codes, scale = quantize_queries(q)
    out = torch.empty_like(q)
    for head, kind in enumerate(kv.kinds):
        places = _positions(kind, layout, q.device)
        keys = kv.key_codes[head].float()
        values = kv.value_codes[head].T
        if kv.value_codes.dtype == torch.float8_e4m3fn:
            values = torch.empty_like(values.float()).index_copy_(
                0, value_places(len(values), q.device), values.float()
            )
        key_scale = kv.key_scale[head].repeat_interleave(GROUP)
        for rows in torch.arange(layout.num_tokens, device=q.device).split(tile_rows):
            at = places[rows][:, None]
            near = (at >= kv.padded_video) | ((at - position).abs() < width)
            seen = (near & is_video) | is_text
            scores = codes[head, rows] @ keys.T * (scale[head, rows] * key_scale) * (q.shape[2] ** -0.5 * log2(e))
            scores = scores.masked_fill(~seen, float("-inf"))
            weights = torch.exp2(scores - scores.amax(1, keepdim=True) + 8)
            rounded = weights.to(kv.value_codes.dtype).float()
            result = rounded @ values.float() / weights.sum(1, keepdim=True)
            out[head, rows] = (result * kv.value_scale[head] + kv.value_shift[head]).to(q.dtype)
    return out


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
