"""HunyuanVideo's two kinds of block over fused operations: the same result as their modules, in a tenth of the passes.

    stream --norm, modulate, scale, rotate, quantize--> codes --INT8 product, GELU or gate + residual--> stream
             `input_quantization`                                `int8_linear`

Weights are expanded from their packed codes right before their product and dropped after it. Text padding is dropped on the
way in: only real tokens are worked on. All samples of a batch go one after the other.

Shapes: L = n + m tokens of one sample (n of the video, m real text tokens), d hidden size, H heads of size D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoTokenReplaceSingleTransformerBlock,
    HunyuanVideoTokenReplaceTransformerBlock,
)
from torch import Tensor, nn

from reelquant.families.hunyuan_video_attention import joined_streams
from reelquant.ops.band_attention.op import dense_attention
from reelquant.ops.input_quantization.op import quantize_input
from reelquant.ops.int8_linear.op import int8_linear
from reelquant.ops.qk_norm_rope.op import qk_norm_rope
from reelquant.quantization.input_transform import current_activation_bits
from reelquant.quantization.linear import QuantizedLinear

_TWO_TIMESTEPS = (HunyuanVideoTokenReplaceTransformerBlock, HunyuanVideoTokenReplaceSingleTransformerBlock)
Modulation = tuple[Tensor, ...]
"""Rows `[d]` of a modulation layer's output for one sample."""
Codes = tuple[Tensor, Tensor]
"""`(codes [N, d] int8, token_scale [N])`."""

_DOUBLE_LAYERS = (
    "norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
    "ff_context.net.2",
)  # fmt: skip
_SINGLE_LAYERS = ("norm.linear", "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v", "proj_out")
_DOUBLE_SHARED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
_SINGLE_SHARED = (("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),)
"""Layers that are given the same codes: they must be one group."""


def fusion_obstacle(block: nn.Module) -> str | None:
    """Why `block` cannot run fused, None where it can: every linear must be quantized, with integer activations, and layers
    that read one tensor must share its transform."""
    is_double = hasattr(block, "norm1")
    if isinstance(block, _TWO_TIMESTEPS):
        return "the tokens of an image are modulated apart"
    for name in _DOUBLE_LAYERS if is_double else _SINGLE_LAYERS:
        layer = block.get_submodule(name)
        if not isinstance(layer, QuantizedLinear):
            return f"{name} is not quantized"
        if layer.spec.activation_bits == 16 and "norm" not in name:
            return f"{name} has 16-bit activations"
    for names in _DOUBLE_SHARED if is_double else _SINGLE_SHARED:
        if len({block.get_submodule(name).spec.group for name in names}) > 1:  # type: ignore[union-attr]
            return f"{', '.join(names)} read one tensor and are not one group"
    attention: Any = block.get_submodule("attn")
    if attention.norm_q is None or attention.norm_k is None:
        return "queries and keys are not normalized"
    return None


def fused_forward(
    block: nn.Module, video: Tensor, text: Tensor, temb: Tensor, lengths: Sequence[int], rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """What `block` computes.

    Args:
        video, text: `[B, n, d]`, `[B, padded, d]`: better the two parts of one tensor, as this function returns them.
        temb: `[B, d]`.
        lengths: real text tokens of every sample.
        rotary: float32 `[n, D]` twice.

    Returns: both streams, views of one tensor; rows of text padding are zero.
    """
    run = _double if hasattr(block, "norm1") else _single
    n = video.shape[1]
    joint = joined_streams(video, text)
    out = torch.empty_like(joint)
    conditioning = nn.functional.silu(temb)
    for item, num_text in enumerate(lengths):
        length = n + num_text
        run(block, item, joint[item, :length], conditioning[item : item + 1], rotary, out[item, :length])
        out[item, length:] = 0
    return out[:, :n], out[:, n:]


def _double(
    block: Any, item: int, stream: Tensor, conditioning: Tensor, rotary: tuple[Tensor, Tensor], out: Tensor
) -> None:
    n, attn = len(rotary[0]), block.attn
    video = _modulation(block.norm1.linear, conditioning, 6)
    text = _modulation(block.norm1_context.linear, conditioning, 6)
    eps = block.norm1.norm.eps
    qkv = stream.new_empty(len(stream), 3 * stream.shape[1])
    for rows, mod, layers in (
        (slice(None, n), video, (attn.to_q, attn.to_k, attn.to_v)),
        (slice(n, None), text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
    ):
        codes = _quantized(layers[0], stream[rows], norm=(eps, 1 + mod[1].float(), mod[0]))
        _products(layers, codes, qkv[rows])
    text_norms = (attn.norm_added_q.weight, attn.norm_added_k.weight)
    attended = _attention(attn, item, qkv, rotary, text_norms)
    del qkv
    for rows, mod, layer in ((slice(None, n), video, attn.to_out[0]), (slice(n, None), text, attn.to_add_out)):
        _add_output(layer, attended[rows], gate=mod[2], residual=stream[rows], out=out[rows])
    del attended
    for rows, mod, feed in ((slice(None, n), video, block.ff), (slice(n, None), text, block.ff_context)):
        inner, outer = feed.net[0].proj, feed.net[2]
        codes = _quantized(inner, out[rows], norm=(block.norm2.eps, 1 + mod[4].float(), mod[3]))
        hidden = out.new_empty(len(codes[0]), inner.out_features)
        _products((inner,), codes, hidden, activation="gelu_tanh")
        _add_output(outer, hidden, gate=mod[5], residual=out[rows], out=out[rows])


def _single(
    block: Any, item: int, stream: Tensor, conditioning: Tensor, rotary: tuple[Tensor, Tensor], out: Tensor
) -> None:
    d, attn = stream.shape[1], block.attn
    shift, scale, gate = _modulation(block.norm.linear, conditioning, 3)
    codes = _quantized(block.proj_mlp, stream, norm=(block.norm.norm.eps, 1 + scale.float(), shift))
    qkv = stream.new_empty(len(stream), 3 * d)
    _products((attn.to_q, attn.to_k, attn.to_v), codes, qkv)
    both = stream.new_empty(len(stream), d + block.proj_mlp.out_features)
    both[:, :d] = _attention(attn, item, qkv, rotary, None)
    del qkv
    _products((block.proj_mlp,), codes, both[:, d:], activation="gelu_tanh")
    del codes
    _add_output(block.proj_out, both, gate=gate, residual=stream, out=out)


def _modulation(layer: QuantizedLinear, conditioning: Tensor, num: int) -> Modulation:
    row: Tensor = layer(conditioning)[0]
    return row.chunk(num)


def _quantized(layer: QuantizedLinear, x: Tensor, *, norm: tuple[float, Tensor, Tensor] | None = None) -> Codes:
    """The input of `layer` and of every layer of its group."""
    own = layer.spec.activation_bits
    bits = current_activation_bits(own)
    clip = None if bits > own else layer.activation_clip
    return quantize_input(
        x, bits=bits, channel_scale=layer.channel_scale, rotation=layer.rotation, clip=clip, norm=norm
    )


def _products(layers: Sequence[QuantizedLinear], codes: Codes, out: Tensor, *, activation: Any = None) -> None:
    """The outputs of layers that read one input, side by side in `out`, from one product."""
    weight = layers[0].integer_weight() if len(layers) == 1 else _stacked_weights(layers)
    scale = torch.cat([layer.weight_scale for layer in layers])
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
    int8_linear(*codes, weight, scale, bias, activation=activation, out=out)


def _stacked_weights(layers: Sequence[QuantizedLinear]) -> Tensor:
    rows = [layer.out_features for layer in layers]
    weight = torch.empty(sum(rows), layers[0].in_features, dtype=torch.int8, device=layers[0].weight_scale.device)
    for layer, part in zip(layers, weight.split(rows), strict=True):
        layer.integer_weight(out=part)
    return weight


def _add_output(layer: QuantizedLinear, x: Tensor, *, gate: Tensor, residual: Tensor, out: Tensor) -> None:
    codes = _quantized(layer, x)
    weight = layer.integer_weight()
    int8_linear(*codes, weight, layer.weight_scale, layer.bias, gate=gate, residual=residual, out=out)


def _attention(
    attn: Any, item: int, qkv: Tensor, rotary: tuple[Tensor, Tensor], text_norms: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`[L, d]` of the raw `[L, 3 d]`, which is changed."""
    norms = (attn.norm_q.weight, attn.norm_k.weight)
    qk_norm_rope(
        qkv, num_heads=attn.heads, norm_weights=norms, rotary=rotary, text_norm_weights=text_norms, eps=attn.norm_q.eps
    )
    q, k, v = (x.unflatten(1, (attn.heads, -1)).transpose(0, 1) for x in qkv.chunk(3, dim=1))
    core = getattr(attn.processor, "core", None)
    out: Tensor = dense_attention(q, k, v) if core is None else core(item, q, k, v)
    return out.transpose(0, 1).flatten(1)
