"""Band attention through torch's FlexAttention: the visited blocks are found by arithmetic, never from an L x L mask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from reelquant.attention.band_mask import place_major_order, place_major_positions
from reelquant.families.family import TokenLayout
from reelquant.ops.band_attention.reference import dense_attention

BLOCK = 128


def band_attention_flex(q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int) -> Tensor:
    """See `op.band_attention`; CUDA only."""
    if width >= layout.num_video:
        return dense_attention(q, k, v)
    mask = band_block_mask(layout.num_video, layout.num_tokens, width, str(q.device))
    temporal = [index for index, kind in enumerate(kinds) if kind == "t"]
    if temporal:
        heads, n = torch.tensor(temporal, device=q.device), layout.num_video
        order = torch.arange(layout.num_tokens, device=q.device)
        order[:n] = place_major_order(layout, q.device)
        q, k, v = (x.index_copy(0, heads, x[heads][:, order]) for x in (q, k, v))
    out: Tensor = _compiled()(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), block_mask=mask)[0]
    if temporal:
        order[:n] = place_major_positions(layout, q.device)
        out = out.index_copy(0, heads, out[heads][:, order])
    return out


@lru_cache(maxsize=16)
def band_block_mask(num_video: int, num_tokens: int, width: int, device: str) -> BlockMask:
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
    return torch.compile(flex_attention, dynamic=False)
