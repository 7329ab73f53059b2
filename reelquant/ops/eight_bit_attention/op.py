"""Attention in 8 bits: checks, and the choice of an implementation. `band_attention` calls it for its `precision`.

| precision | scores | weights and values | error beside 16 bits |
|---|---|---|---|
| `int8_fp8` | INT8 | e4m3 | 3 to 4 % of values without structure, most of it the 3 bits of mantissa of weights and values |
| `int8_16` | INT8 | the inputs' 16 bits | 1 to 2 % |

| implementation | where |
|---|---|
| `reference` | any device; slow |
| `triton` | Hopper (`NEEDS`), bf16 and fp16, head size 64 or 128, no gradient |

| input | error beside 16 bits |
|---|---|
| one key 20 or 100 times louder | its 128 positions share its INT8 scale: 4 to 5 % (two heads, 380 tokens) |
| weights below 2^-18 of their row's largest | become 0 in e4m3 but stay in the sum: the mean value takes their place |
| NaN | a query's makes its row NaN, a key's all rows that visit its 128 positions, a value's its channel in all rows |

`auto` takes `triton` for 16-bit tensors on CUDA and raises where that cannot run: the reference would be far slower than 16-bit
attention. For 32-bit tensors, where speed is not the point, it takes the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reelquant.ops.architecture import Needs
from reelquant.ops.band_attention.reference import Correction, corrected
from reelquant.ops.eight_bit_attention.reference import (
    KeysValues,
    Precision,
    eight_bit_attention_reference,
    quantize_keys_values_reference,
)
from reelquant.ops.implementation import Implementation, takes_triton
from reelquant.tokens import TokenLayout

__all__ = [
    "NEEDS",
    "KeysValues",
    "Precision",
    "eight_bit_attention",
    "eight_bit_dense_and_band",
    "quantize_keys_values",
]

NEEDS = Needs(("wgmma", "tma", "int8", "e4m3"), shared_kib=105)
_RANKS = (16, 32, 64, 128)


def quantize_keys_values(
    k: Tensor,
    v: Tensor,
    *,
    kinds: str,
    layout: TokenLayout,
    precision: Precision = "int8_fp8",
    implementation: Implementation = "auto",
) -> KeysValues:
    """Keys and values as `eight_bit_attention` takes them; once for all attention over them.

    Args:
        k, v: `[H, L, D]` floating, any strides with D innermost; video tokens frame-major, then text.
        kinds: one letter a head, `s` or `t`: the order that they are written in.
        layout: the token grid; `layout.num_tokens` is L.
        precision: see the module.
        implementation: see the module.

    Raises: ValueError for shapes, kinds or a precision that do not fit, or an implementation that cannot take the tensors.
    """
    if k.ndim != 3 or k.shape != v.shape or k.shape[1] != layout.num_tokens:
        raise ValueError(f"k and v must be [H, {layout.num_tokens}, D], got {tuple(k.shape)} and {tuple(v.shape)}")
    if len(kinds) != k.shape[0] or set(kinds) - {"s", "t"}:
        raise ValueError(f"kinds must be one of s and t for each of {k.shape[0]} heads, got {kinds!r}")
    if precision not in ("int8_fp8", "int8_16"):
        raise ValueError(f"no precision {precision!r} of 8-bit attention: there are int8_fp8 and int8_16")
    takes = _takes_triton(implementation, k, v)
    with torch.no_grad():
        if takes:
            from reelquant.ops.eight_bit_attention.launch import quantize_keys_values_triton

            return quantize_keys_values_triton(k, v, kinds=kinds, layout=layout, precision=precision)
        return quantize_keys_values_reference(k, v, kinds=kinds, layout=layout, precision=precision)


def eight_bit_attention(
    q: Tensor,
    keys_values: KeysValues,
    *,
    width: int | None = None,
    corrections: Sequence[Correction] = (),
    out: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention under the band mask (see `band_attention`) in 8 bits; no gradient.

    Args:
        q: `[H, L, D]` floating.
        keys_values: of the same tokens.
        width: of the band, None for all keys.
        corrections: added to the normalized result in 16 bits.
        out: receives the result: `[H, L, D]` in the dtype of `q`.
        implementation: see the module.

    Returns: `[H, L, D]` in the dtype of `q`; `out` if given.
    Raises: ValueError for shapes that do not fit, or an implementation that cannot take the tensors.
    """
    width = _checked_width(q, keys_values, width)
    takes = _takes_triton(implementation, q, *([] if out is None else [out]), corrections=corrections)
    with torch.no_grad():
        if takes:
            from reelquant.ops.eight_bit_attention.launch import eight_bit_attention_triton

            return eight_bit_attention_triton(q, keys_values, width=width, corrections=corrections, out=out)
        plain = eight_bit_attention_reference(q, keys_values, width=width)
        result = corrected(plain, corrections)
        return result if out is None else out.copy_(result)


def eight_bit_dense_and_band(
    q: Tensor, keys_values: KeysValues, *, width: int, implementation: Implementation = "auto"
) -> tuple[Tensor, Tensor]:
    """`(dense, band)` of `eight_bit_attention`; `triton` makes both in one pass. Args, Raises: as there."""
    width = _checked_width(q, keys_values, width)
    takes = _takes_triton(implementation, q)
    with torch.no_grad():
        if takes:
            from reelquant.ops.eight_bit_attention.launch import eight_bit_dense_and_band_triton

            return eight_bit_dense_and_band_triton(q, keys_values, width=width)
        num_video = keys_values.layout.num_video
        dense, band = (eight_bit_attention_reference(q, keys_values, width=each) for each in (num_video, width))
        return dense, band


def _checked_width(q: Tensor, keys_values: KeysValues, width: int | None) -> int:
    heads, head_dim = keys_values.value_scale.shape
    expected = (heads, keys_values.layout.num_tokens, head_dim)
    if q.shape != expected or q.device != keys_values.key_codes.device:
        raise ValueError(
            f"q must be {expected} on {keys_values.key_codes.device} as the keys are, got {tuple(q.shape)} on {q.device}"
        )
    if width is not None and width < 1:
        raise ValueError(f"the band's width is {width}; it must be at least 1 token")
    return keys_values.layout.num_video if width is None else width


def _takes_triton(implementation: Implementation, *tensors: Tensor, corrections: Sequence[Correction] = ()) -> bool:
    device = tensors[0].device
    terms = [tensor for term in corrections for tensor in (term.rows, term.directions)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *terms)):
        raise ValueError("8-bit attention gives no gradient: call under torch.no_grad(), or with precision full")
    if implementation == "auto" and device.type == "cuda" and tensors[0].dtype in (torch.bfloat16, torch.float16):
        implementation = "triton"
    unsuited = _unsuited(*tensors, corrections=corrections)
    return takes_triton(implementation, device, unsuited=unsuited, needs=NEEDS)


def _unsuited(*tensors: Tensor, corrections: Sequence[Correction]) -> str | None:
    """What the kernels do not take, None where they take it."""
    x, rows = tensors[0], [term.rows for term in corrections]
    if x.dtype not in (torch.bfloat16, torch.float16) or any(y.dtype != x.dtype for y in tensors):
        return f"tensors are {', '.join(str(y.dtype) for y in tensors)}, not all bfloat16 or all float16"
    if any(y.dtype not in (x.dtype, torch.int8) for y in rows):
        return f"rows of corrections are {', '.join(str(y.dtype) for y in rows)}, not {x.dtype} or int8"
    if x.shape[2] not in (64, 128):
        return f"the head size is {x.shape[2]}, not 64 or 128"
    if any(y.stride(2) != 1 for y in (*tensors, *rows)):
        return "a last dimension is not contiguous"
    if len(corrections) > 2 or any(y.shape[2] not in _RANKS for y in rows):
        return f"there are corrections of ranks {[y.shape[2] for y in rows]}, not at most two of {_RANKS}"
    return None
