"""Normalization and rotary embedding of queries and keys, in place, in Triton: bound by memory.

A program takes some tokens and walks the heads, query and key of a head together: the rotary tables are read once a token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reelquant.ops.architecture import launching


@triton.jit
def _normed_and_turned(pointers, inside, weight, cos, sin, eps, DIM: tl.constexpr, TOKENS: tl.constexpr):
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None] * weight
    first, second = tl.split(tl.reshape(x, (TOKENS, DIM // 2, 2)))
    turned = tl.reshape(tl.join(-second, first), (TOKENS, DIM))
    return x * cos + turned * sin


@triton.jit(do_not_specialize=["num_tokens", "num_video"])
def _qk_norm_rope(
    qkv, q_weight, k_weight, text_q_weight, text_k_weight, cos_table, sin_table, stride, num_tokens, num_video, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, DIM)
    inside = (token < num_tokens)[:, None]
    is_video = (token < num_video)[:, None]
    places = token[:, None] * DIM + column[None, :]
    cos = tl.load(cos_table + places, mask=is_video, other=1.0)
    sin = tl.load(sin_table + places, mask=is_video, other=0.0)
    of_q = tl.where(is_video, tl.load(q_weight + column)[None, :], tl.load(text_q_weight + column)[None, :])
    of_k = tl.where(is_video, tl.load(k_weight + column)[None, :], tl.load(text_k_weight + column)[None, :])
    of_q, of_k = of_q.to(tl.float32), of_k.to(tl.float32)
    q_pointers = qkv + token.to(tl.int64)[:, None] * stride + column[None, :]
    for _ in tl.range(HEADS, num_stages=STAGES):
        k_pointers = q_pointers + HEADS * DIM
        q = _normed_and_turned(q_pointers, inside, of_q, cos, sin, eps, DIM, TOKENS)
        k = _normed_and_turned(k_pointers, inside, of_k, cos, sin, eps, DIM, TOKENS)
        tl.store(q_pointers, q.to(qkv.dtype.element_ty), mask=inside)
        tl.store(k_pointers, k.to(qkv.dtype.element_ty), mask=inside)
        q_pointers += DIM


def launch_qk_norm_rope(
    qkv: Tensor,
    *,
    num_heads: int,
    norm_weights: tuple[Tensor, Tensor],
    text_norm_weights: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    eps: float,
    tokens: int = 16,
    num_warps: int = 4,
    num_stages: int = 1,
) -> Tensor:
    """Changes `qkv`; arguments as checked by `op.qk_norm_rope`. `tokens`: of a program."""
    with launching(qkv):
        _qk_norm_rope[(triton.cdiv(len(qkv), tokens),)](
            qkv,
            *norm_weights,
            *text_norm_weights,
            *rotary,
            qkv.stride(0),
            len(qkv),
            len(rotary[0]),
            eps,
            HEADS=num_heads,
            DIM=len(norm_weights[0]),
            TOKENS=tokens,
            STAGES=num_stages,
            num_warps=num_warps,
        )
    return qkv
