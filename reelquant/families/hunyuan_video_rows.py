"""HunyuanVideo's two kinds of block for some of their tokens: all tokens are attended to, only these ask and go on.

    stream [L, d] --norm, modulate--> keys, values of all L tokens --+
         `--rows--> queries of R tokens ------------------------> attention --> output projection, residual, MLP [R, d]

The block's own modules are called, in the block's own order, so hooks and quantized layers in their place work as ever.
Layers that read one tensor are called one after the other on it: they share its transform, which remembers one tensor only.

Shapes: L = n + m tokens of one sample (n of the video, m of the text), R of them in `rows` (the text's last), d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.families.hunyuan_video_attention import attend_rows

Replaced = tuple[Tensor, int] | None
"""Embedding `[1, d]` that modulates the first tokens in place of the others', and their number."""


def block_rows(
    block: nn.Module,
    stream: Tensor,
    temb: Tensor,
    *,
    rotary: tuple[Tensor, Tensor],
    rows: Tensor,
    replaced: Replaced = None,
) -> Tensor:
    """The output of `block` at `rows`: `[1, L, d] -> [1, R, d]`; differentiable, equal to the same rows of the whole output.

    Args:
        temb: `[1, d]`.
        rotary: `[n, D]` twice.
        rows: int64 `[R]`, of the video, then all m of the text.
        replaced: of blocks that modulate the tokens of an image apart (`token_replace`).
    """
    run = _double if hasattr(block, "norm1") else _single
    return run(block, stream, temb, rotary, rows, replaced)


def _double(
    block: Any, stream: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor], rows: Tensor, replaced: Replaced
) -> Tensor:
    num_video, attn = len(rotary[0]), block.attn
    video, text = stream[:, :num_video], stream[:, num_video:]
    video_rows = rows[: len(rows) - text.shape[1]]
    inputs, *video_modulation = _modulated(block.norm1, video, temb, video_rows, replaced)
    text_inputs, *text_modulation = _modulated(block.norm1_context, text, temb, video_rows, None)
    chosen = inputs.index_select(1, video_rows)
    attended = attend_rows(attn, inputs, chosen, rows=rows, rotary=rotary, text=text_inputs)
    video_out = attn.to_out[1](attn.to_out[0](attended[:, : len(video_rows)]))
    text_out = attn.to_add_out(attended[:, len(video_rows) :])
    video = _continued(video.index_select(1, video_rows), video_out, video_modulation, block.norm2, block.ff)
    text = _continued(text, text_out, text_modulation, block.norm2_context, block.ff_context)
    return torch.cat([video, text], dim=1)


def _continued(
    stream: Tensor, attended: Tensor, modulation: Sequence[Tensor], norm: nn.Module, feed_forward: nn.Module
) -> Tensor:
    """What follows the attention in a double-stream block; `modulation`: gate, then shift, scale and gate of the MLP."""
    gate, shift, scale, gate_mlp = modulation
    stream = stream + attended * gate
    inner = norm(stream) * (1 + scale) + shift
    out: Tensor = stream + gate_mlp * feed_forward(inner)
    return out


def _modulated(norm: Any, stream: Tensor, temb: Tensor, rows: Tensor, replaced: Replaced) -> list[Tensor]:
    """The modulated stream, and what the block multiplies and shifts by later: `[1, 1, d]`, or `[1, R, d]` at `rows`."""
    if replaced is None:
        inputs, *modulation = norm(stream, emb=temb)
        return [inputs, *(row.unsqueeze(1) for row in modulation)]
    embedding, num_tokens = replaced
    inputs, *modulation = norm(stream, temb, embedding, num_tokens)
    own, first = modulation[: len(modulation) // 2], modulation[len(modulation) // 2 :]
    is_first = (rows < num_tokens)[None, :, None]
    return [inputs, *(torch.where(is_first, a[:, None], b[:, None]) for a, b in zip(first, own, strict=True))]


def _single(
    block: Any, stream: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor], rows: Tensor, replaced: Replaced
) -> Tensor:
    inputs, gate = _modulated(block.norm, stream, temb, rows, replaced)
    chosen = inputs.index_select(1, rows)
    mlp = block.act_mlp(block.proj_mlp(chosen))
    attended = attend_rows(block.attn, inputs, chosen, rows=rows, rotary=rotary, text=None)
    out: Tensor = gate * block.proj_out(torch.cat([attended, mlp], dim=2))
    return out + stream.index_select(1, rows)
