"""How far quantization moves the attention (multi-scale salient attention distillation, QuantSparse §3.2).

Shapes: H heads, L tokens, D head size, k salient tokens, n pooled tokens. Both losses are mean squared differences of two
softmax maps, full precision's and the quantized block's:

| loss | rows | columns | sees |
|---|---|---|---|
| global | runs of tokens, pooled | runs of tokens, pooled | where attention goes at large |
| local | the k tokens that receive most attention | all tokens | what those look for |

No map is ever whole: tiles of rows are walked once, loss and gradients come from the same pass, and only gradients are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reelquant.attention.column_sums import TILE_BYTES
from reelquant.calibration.host_memory import moved


@dataclass(frozen=True)
class AttentionTargets:
    """The full-precision side of one sample's losses, from `attention_targets`. What a loss does not need is None."""

    shape: tuple[int, int, int]
    """(H, L, D)."""
    stride: int | None
    """Tokens in a pooled run."""
    q_pooled: Tensor | None
    """[H, n, D], float32 or wider; so is `k_pooled`."""
    k_pooled: Tensor | None
    indices: Tensor | None
    """int64 [k], the salient tokens."""
    q_salient: Tensor | None
    """[H, k, D], their queries."""
    k: Tensor | None
    """[H, L, D]."""

    def to(self, device: torch.device | str) -> AttentionTargets:
        """The same on `device`."""
        device = torch.device(device)
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        there: dict[str, Any] = {name: moved(x, device) if isinstance(x, Tensor) else x for name, x in values.items()}
        return AttentionTargets(**there)


def attention_targets(
    q: Tensor, k: Tensor, *, stride: int | None = None, indices: Tensor | None = None
) -> AttentionTargets:
    """What the losses need of full precision's `q` and `k`; without gradients.

    Args:
        q, k: [H, L, D] floating, after normalization and rotary embedding.
        stride: tokens pooled to one (128 in the paper), at least 1; None without a global loss.
        indices: integers [k] in 0..L-1, from `salient_tokens`; None without a local loss.

    Raises: ValueError for other shapes, strides or indices, NaN or inf in `q` or `k`.
    """
    _check_pair("q", q, "k", k)
    for name, tensor in (("q", q), ("k", k)):
        _check_finite(name, tensor)
    with torch.no_grad():
        indices = None if indices is None else _checked_indices(indices, q.shape[1]).to(q.device)
        return AttentionTargets(
            shape=(q.shape[0], q.shape[1], q.shape[2]),
            stride=stride,
            q_pooled=None if stride is None else pool_tokens(q, stride),
            k_pooled=None if stride is None else pool_tokens(k, stride),
            indices=indices,
            q_salient=None if indices is None else q.index_select(1, indices),
            k=None if indices is None else k.detach().contiguous(),
        )


def global_loss(targets: AttentionTargets, q_q: Tensor, k_q: Tensor, *, tile_bytes: int = TILE_BYTES) -> Tensor:
    """Mean squared difference of the softmax maps [H, n, n] of pooled queries and keys.

    Args:
        targets: of the same sample, with a stride, on the same device.
        q_q, k_q: [H, L, D] floating of the quantized block.
        tile_bytes: size of a score tile, > 0; about three are held at a time, each of at least one row.

    Returns: float32 scalar (float64 for float64), with gradients for `q_q` and `k_q`; NaN where they hold NaN or inf.
    Raises: ValueError for shapes that do not fit, or targets without a stride.
    """
    if targets.stride is None:
        raise ValueError("these targets have nothing pooled: pass a stride to attention_targets")
    assert targets.q_pooled is not None
    assert targets.k_pooled is not None
    _check_quantized(targets, q_q, k_q)
    pooled = pool_tokens(q_q, targets.stride), pool_tokens(k_q, targets.stride)
    return _map_error(targets.q_pooled, targets.k_pooled, *pooled, tile_bytes=tile_bytes)


def local_loss(targets: AttentionTargets, q_q: Tensor, k_q: Tensor, *, tile_bytes: int = TILE_BYTES) -> Tensor:
    """Mean squared difference of the softmax maps [H, k, L] of the salient tokens' queries; as `global_loss`, with indices."""
    if targets.indices is None:
        raise ValueError("these targets have no salient tokens: pass indices to attention_targets")
    assert targets.q_salient is not None
    assert targets.k is not None
    _check_quantized(targets, q_q, k_q)
    rows = q_q.index_select(1, targets.indices)
    return _map_error(targets.q_salient, targets.k, rows, k_q, tile_bytes=tile_bytes)


def global_attention_loss(q_fp: Tensor, k_fp: Tensor, q_q: Tensor, k_q: Tensor, stride: int) -> Tensor:
    """`global_loss` from both sides at once: [H, L, D] four times -> scalar; no gradient for `q_fp` and `k_fp`.

    Raises: ValueError for other shapes, a stride below 1, NaN or inf.
    """
    loss = global_loss(attention_targets(q_fp, k_fp, stride=stride), q_q, k_q)
    return _checked_loss(loss, q_q, k_q)


def local_attention_loss(q_fp: Tensor, k_fp: Tensor, q_q: Tensor, k_q: Tensor, indices: Tensor) -> Tensor:
    """`local_loss` from both sides at once: [H, L, D] four times -> scalar; no gradient for `q_fp` and `k_fp`.

    Raises: ValueError for other shapes, indices outside 0..L-1, NaN or inf.
    """
    loss = local_loss(attention_targets(q_fp, k_fp, indices=indices), q_q, k_q)
    return _checked_loss(loss, q_q, k_q)


def salient_tokens(column_sums: Tensor, num: int) -> Tensor:
    """The `num` tokens that receive most attention: int64 [min(num, L)], ascending; of equal ones the first.

    Args: `column_sums` [L] floating (`attention.column_sums`); `num` at least 1.
    Raises: ValueError for other shapes or numbers, NaN or inf.
    """
    if column_sums.ndim != 1 or column_sums.numel() == 0:
        raise ValueError(f"column_sums must be [L], got {tuple(column_sums.shape)}")
    if num < 1:
        raise ValueError(f"num is {num}; at least one token must be salient")
    _check_finite("column_sums", column_sums)
    order = column_sums.detach().sort(descending=True, stable=True).indices
    return order[:num].sort().values


def pool_tokens(x: Tensor, stride: int) -> Tensor:
    """Means of `stride` consecutive tokens; of what is there in the last run.

    Args: `x` [H, L, D] floating; `stride` at least 1, also above L.
    Returns: [H, ceil(L / stride), D], float32 (float64 for float64); differentiable.
    Raises: ValueError for other shapes or strides.
    """
    if x.ndim != 3 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating [H, L, D], got {x.dtype} {tuple(x.shape)}")
    if stride < 1:
        raise ValueError(f"stride is {stride}; at least 1 token makes a run")
    pooled: Tensor = _PooledTokens.apply(x, stride)  # type: ignore[no-untyped-call]
    return pooled


class _PooledTokens(torch.autograd.Function):
    """Its gradient is only ever in the dtype of `x`: autograd's own would be [H, L, D] in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.length, ctx.stride, ctx.dtype = x.shape[1], stride, x.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        whole = x.shape[1] // stride * stride
        runs = [x[:, :whole].unflatten(1, (-1, stride)).mean(dim=2, dtype=wide)] if whole else []
        if whole < x.shape[1]:
            runs.append(x[:, whole:].mean(dim=1, keepdim=True, dtype=wide))
        return torch.cat(runs, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        starts = torch.arange(0, ctx.length, ctx.stride, device=grads[0].device)
        sizes = (ctx.length - starts).clamp(max=ctx.stride).view(-1, 1)
        each = (grads[0] / sizes).to(ctx.dtype)
        return each.repeat_interleave(ctx.stride, dim=1)[:, : ctx.length], None


def _map_error(q_fp: Tensor, k_fp: Tensor, q_q: Tensor, k_q: Tensor, *, tile_bytes: int) -> Tensor:
    """Mean squared difference of the softmax maps of `q` [H, r, D] against `k` [H, L, D], in float32 or wider."""
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes must be positive, got {tile_bytes}")
    if q_fp.device != q_q.device:
        raise ValueError(
            f"the targets are on {q_fp.device}, the quantized tensors on {q_q.device}; move them with to()"
        )
    learns = torch.is_grad_enabled() and (q_q.requires_grad or k_q.requires_grad)
    loss: Tensor = _MapError.apply(q_fp, k_fp, q_q, k_q, tile_bytes, learns)  # type: ignore[no-untyped-call]
    return loss


class _MapError(torch.autograd.Function):
    """Keeps the gradients of the sum of squares, not the maps; `backward` scales them."""

    @staticmethod
    def forward(
        ctx: Any, q_fp: Tensor, k_fp: Tensor, q_q: Tensor, k_q: Tensor, tile_bytes: int, learns: bool
    ) -> Tensor:
        dtype = torch.promote_types(q_q.dtype, torch.float32)
        num_rows, head_dim = q_q.shape[1:]
        length = k_q.shape[1]
        total = torch.zeros((), dtype=torch.float64, device=q_q.device)
        gradient_q, gradient_k = (torch.empty_like(x) if learns else None for x in (q_q, k_q))
        for heads, tile_rows in _tiles(
            len(q_q), num_rows, length, head_dim=head_dim, tile_bytes=tile_bytes, dtype=dtype
        ):
            keys_fp, keys = k_fp[heads].to(dtype), k_q[heads].to(dtype)
            gradient_keys = torch.zeros_like(keys) if learns else None
            for start in range(0, num_rows, tile_rows):
                tile = slice(start, start + tile_rows)
                rows = q_q[heads, tile].to(dtype) * head_dim**-0.5
                error = _softmax(q_fp[heads, tile].to(dtype) * head_dim**-0.5, keys_fp)
                weights = _softmax(rows, keys)
                torch.sub(weights, error, out=error)
                total += error.flatten().dot(error.flatten())
                if gradient_q is None or gradient_keys is None:
                    continue
                error.sub_((error * weights).sum(dim=-1, keepdim=True)).mul_(weights)
                gradient_q[heads, tile] = error @ keys
                gradient_keys.baddbmm_(error.transpose(1, 2), rows)
            if gradient_k is not None and gradient_keys is not None:
                gradient_k[heads] = gradient_keys
        count = len(q_q) * num_rows * length
        if learns:
            ctx.save_for_backward(gradient_q, gradient_k)
            ctx.factors = (2 * head_dim**-0.5 / count, 2 / count)
        return (total / count).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            _scaled(gradient, grads[0] * factor) if needed else None
            for gradient, factor, needed in zip(ctx.saved_tensors, ctx.factors, ctx.needs_input_grad[2:4], strict=True)
        ]
        return None, None, *scaled, None, None


def _tiles(
    num_heads: int, num_rows: int, length: int, *, head_dim: int, tile_bytes: int, dtype: torch.dtype
) -> Iterator[tuple[slice, int]]:
    """Groups of heads, with the number of rows of a tile: neither scores nor a group's keys exceed `tile_bytes` by much."""
    row_bytes = length * dtype.itemsize
    tile_rows = max(1, min(num_rows, tile_bytes // row_bytes))
    tile_heads = max(1, tile_bytes // (row_bytes * max(tile_rows, head_dim)))
    for start in range(0, num_heads, tile_heads):
        yield slice(start, min(num_heads, start + tile_heads)), tile_rows


def _softmax(rows: Tensor, keys: Tensor) -> Tensor:
    return torch.bmm(rows, keys.transpose(1, 2)).softmax(dim=-1)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor` in the dtype of `gradient`, multiplied in the wider dtype of `factor`, head by head."""
    result = torch.empty_like(gradient)
    for head, out in zip(gradient, result, strict=True):
        out.copy_(head.to(factor.dtype) * factor)
    return result


def _check_pair(q_name: str, q: Tensor, k_name: str, k: Tensor) -> None:
    if q.ndim != 3 or q.shape != k.shape or q.numel() == 0 or not (q.is_floating_point() and k.is_floating_point()):
        raise ValueError(
            f"{q_name} and {k_name} must both be floating [H, L, D], got {tuple(q.shape)} and {tuple(k.shape)}"
        )


def _check_quantized(targets: AttentionTargets, q_q: Tensor, k_q: Tensor) -> None:
    _check_pair("q_q", q_q, "k_q", k_q)
    if tuple(q_q.shape) != targets.shape:
        raise ValueError(
            f"q_q and k_q are {tuple(q_q.shape)}, full precision's were {targets.shape}: not the same sample"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.stack(tensor.detach().aminmax()).isfinite().all()):  # without a tensor as large as it
        bad = int((~tensor.isfinite()).sum())
        raise ValueError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}")


def _checked_indices(indices: Tensor, length: int) -> Tensor:
    """int64, on its device."""
    if indices.ndim != 1 or indices.numel() == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices must be integers [k], got {indices.dtype} {tuple(indices.shape)}")
    outside = indices[(indices < 0) | (indices >= length)]
    if len(outside):
        raise ValueError(f"indices hold {int(outside[0])}; {length} tokens have the indices 0 to {length - 1}")
    return indices.to(torch.int64)


def _checked_loss(loss: Tensor, q_q: Tensor, k_q: Tensor) -> Tensor:
    if not bool(loss.isfinite()):
        for name, tensor in (("q_q", q_q), ("k_q", k_q)):
            _check_finite(name, tensor)
        raise ValueError(f"the products of q and k overflow {loss.dtype}: pass float64, or check the scale of q and k")
    return loss
