"""Norm and rotary embedding of queries and keys in a fused q|k|v buffer: checks, and the choice of an implementation.

    x = x / sqrt(mean(x^2) + eps) * weight                        each head of q and k
    x = x * cos + turned(x) * sin        turned: (a, b) -> (-b, a)    tokens of the video alone

This is what diffusers computes for HunyuanVideo (RMSNorm, then `apply_rotary_emb` with neighbours as pairs), rounded to
the buffer's dtype once.

| implementation | where |
|---|---|
| `reference` | any device |
| `triton` | CUDA from compute capability 8.0; D a power of two, 16 to 256 |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reelquant.ops.implementation import Implementation, takes_triton
from reelquant.ops.qk_norm_rope.reference import qk_norm_rope_reference

__all__ = ["Implementation", "qk_norm_rope"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def qk_norm_rope(
    qkv: Tensor,
    *,
    num_heads: int,
    norm_weights: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    text_norm_weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    implementation: Implementation = "auto",
) -> Tensor:
    """Changes q and k in place, in float32 inside.

    Shapes: L tokens, the first n of them of the video; H heads of size D, D even.

    Args:
        qkv: bf16, fp16 or fp32 `[L, at least 2 H D]`: q of all heads, k of all heads, then what is left alone (v). Rows
            may have any stride between them, columns lie side by side.
        num_heads: H.
        norm_weights: of q and of k, floating `[D]`.
        rotary: cosines and sines, float32 `[n, D]`, n at most L.
        text_norm_weights: of q and k of the tokens from n on, where they have others (double-stream blocks).
        eps: added to the mean square.
        implementation: `auto` takes the kernel where it runs.

    Returns: `qkv`. No gradient passes through it.
    Raises: ValueError for shapes or dtypes that do not fit, or `triton` where the kernel does not run.
    """
    if qkv.ndim != 2 or qkv.dtype not in _FLOATS or not qkv.numel() or (qkv.shape[1] > 1 and qkv.stride(1) != 1):
        raise ValueError(
            f"qkv must be bf16, fp16 or fp32 [L, at least 2 H D] with columns side by side, "
            f"got {qkv.dtype} {list(qkv.shape)} with strides {qkv.stride()}"
        )
    text_norm_weights = norm_weights if text_norm_weights is None else text_norm_weights
    weights = (*norm_weights, *text_norm_weights)
    d = norm_weights[0].numel()
    problems = []
    if any(w.shape != (d,) or not w.is_floating_point() or not w.is_contiguous() for w in weights):
        problems.append(f"norm weights must all be floating [{d}], got {[(w.dtype, list(w.shape)) for w in weights]}")
    cos, sin = rotary
    if d % 2 or cos.shape != sin.shape or cos.ndim != 2 or cos.shape[1] != d or len(cos) > len(qkv):
        problems.append(
            f"rotary tables must be [n, {d}] with {d} even and n at most {len(qkv)}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if not (cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()):
        problems.append(f"rotary tables must be float32 and contiguous, got {cos.dtype} and {sin.dtype}")
    if num_heads < 1 or qkv.shape[1] < 2 * num_heads * d:
        problems.append(f"q and k of {num_heads} heads of {d} need {2 * num_heads * d} columns, qkv has {qkv.shape[1]}")
    if any(x.device != qkv.device for x in (*weights, cos, sin)):
        problems.append(f"all tensors must be on {qkv.device} as qkv is")
    if problems:
        raise ValueError("; ".join(problems))
    unsuited = None if 16 <= d <= 256 and not d & (d - 1) else f"heads of {d}; it takes powers of two from 16 to 256"
    with torch.no_grad():
        if takes_triton(implementation, qkv.device, unsuited=unsuited):
            from reelquant.ops.qk_norm_rope.kernel import launch_qk_norm_rope

            run: Callable[..., Tensor] = launch_qk_norm_rope
        else:
            run = qk_norm_rope_reference
        return run(
            qkv,
            num_heads=num_heads,
            norm_weights=norm_weights,
            text_norm_weights=text_norm_weights,
            rotary=rotary,
            eps=eps,
        )
