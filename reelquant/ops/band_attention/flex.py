"""Attention through torch's FlexAttention: under band masks, whose visited blocks are found by arithmetic and never from an
L x L mask, and dense with the same gradients every time.

It is compiled for any length at once: samples differ in their text, torch gives up after eight lengths that it compiled one by
one, and a kernel for one length and one for any may round differently, so that bits would depend on what a process did before.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from reelquant.ops.architecture import current_stream
from reelquant.ops.band_attention.reference import dense_attention
from reelquant.tokens import TokenLayout

BLOCK = 128
MOST_COMPILATIONS = 64
"""Of a process: one a dtype, number and size of heads, kind of call and mode of torch. Beyond, torch would build whole maps."""


def dense_attention_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention `[H, R, D]` over all keys `[H, L, D]`; its gradients are sums in a fixed order. CUDA only."""
    return _attend(q, k, v, None)


def band_attention_flex(q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int) -> Tensor:
    """See `op.band_attention`; CUDA only."""
    if width >= layout.num_video:
        return dense_attention(q, k, v)
    mask = band_block_mask(layout.num_video, layout.num_tokens, width, q.device, current_stream(q.device))
    frames, places = layout.num_frames, layout.height * layout.width
    q, k, v = (swap_orders(x, kinds, frames, places) for x in (q, k, v))
    return swap_orders(_attend(q, k, v, mask), kinds, places, frames)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Tensor:
    # A copy is a view of nothing. torch compiles for what a view is a view of: up to 9 s where a block with temporal heads
    # follows others, or a single one double ones (H200). The copies read and write 1 GB at 26,000 tokens.
    q, k, v = (x.unsqueeze(0).clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    with torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS, fail_on_recompile_limit_hit=True):
        out: Tensor = _compiled()(q, k, v, block_mask=mask)[0]
    return out


def swap_orders(x: Tensor, kinds: str, outer: int, inner: int) -> Tensor:
    """`x [H, L, D]`, the video tokens of its temporal heads with their axes `outer` and `inner` exchanged: frame-major tokens
    become place-major ones, or back. Views and copies: a gradient through indices would be added up."""
    if "t" not in kinds:
        return x
    return torch.stack(
        [_swapped(head, outer, inner) if kind == "t" else head for kind, head in zip(kinds, x, strict=True)]
    )


def _swapped(head: Tensor, outer: int, inner: int) -> Tensor:
    video, text = head[: outer * inner], head[outer * inner :]
    return torch.cat([video.unflatten(0, (outer, inner)).transpose(0, 1).flatten(0, 1), text])


@lru_cache(maxsize=64)
def band_block_mask(num_video: int, num_tokens: int, width: int, device: torch.device, _stream: int) -> BlockMask:
    """Blocks of 128 x 128 that a band over the first `num_video` tokens and the dense text touch or fill."""

    def band(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return ((row - column).abs() < width) | (row >= num_video) | (column >= num_video)

    count = -(-num_tokens // BLOCK)
    first = torch.arange(count, device=device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=num_tokens - 1)
    text = last >= num_video
    all_text = first >= num_video
    gap = torch.maximum(first[:, None] - last[None, :], first[None, :] - last[:, None])
    reach = torch.maximum(last[:, None] - first[None, :], last[None, :] - first[:, None])
    touched = (gap < width) | text[:, None] | text[None, :]
    full = ((reach < width) & ~text[:, None] & ~text[None, :]) | all_text[:, None] | all_text[None, :]
    # The last block is partial where the tokens end inside it: its columns beyond the end must be masked.
    if num_tokens % BLOCK:
        full[:, -1] = False
        full[-1, :] = False
    partial = touched & ~full
    return BlockMask.from_kv_blocks(
        *_indices(partial), *_indices(full), BLOCK_SIZE=BLOCK, mask_mod=band, seq_lengths=(num_tokens, num_tokens)
    )


def _indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(number [1, 1, rows], columns [1, 1, rows, columns])` of the blocks that are set, set ones first."""
    order = torch.argsort(blocks.to(torch.int32), dim=1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], order[None, None].contiguous()


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # Inductor moves Triton's cache when it compiles, but not when it finds what it compiled before: in the next process all
    # kernels would be compiled again, 9 s of a distillation worker's first unit.
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)
    return torch.compile(flex_attention, dynamic=True)
