"""Linear layers while they are calibrated: the input group's transform, fake quantization, and the rounded weights after it.

Shapes: N tokens, d inputs, n outputs, b the rotation block.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reelquant.ops.implementation import turns
from reelquant.quantization.quantizer import fake_quantize
from reelquant.quantization.rotation import block_size, cayley, hadamard, rotate_blocks, transform_weight
from reelquant.quantization.weight_grid import WeightGrid, fake_quantize_weight, fit_per_channel, fit_two_level
from reelquant.settings.generation import LayerBits
from reelquant.settings.recipe import Recipe

_CLIP_CANDIDATES = tuple(1.0 - 0.025 * i for i in range(21))


LARGEST_START = 0.998
"""Where a learned clip of the whole range starts, its sigmoid being below 1: `127 / 0.998 = 127.25`, so that the largest value
of 8 bits still rounds to the largest code and nothing is cut off."""


def _logit(clip: Tensor) -> Tensor:
    return torch.logit(clip.clamp(0.05, LARGEST_START))


class GroupTransform(nn.Module):
    """Channel scale, rotation and activation clip of one input group, with gradients while they are learned.

    After `freeze` the transform is exactly what the checkpoint stores: scale and clip float32, rotation bfloat16.
    """

    start: Tensor | None
    """`[b, b]`: the Hadamard matrix from which the rotation starts."""

    def __init__(self, num_inputs: int, activation_bits: int, recipe: Recipe, *, initial_scale: Tensor | None) -> None:
        super().__init__()
        quantized = activation_bits < 16
        self.activation_bits = activation_bits
        scale = torch.ones(num_inputs) if initial_scale is None else initial_scale.detach().float().cpu()
        self.log_scale: nn.Parameter | None = None
        self.skew: nn.Parameter | None = None
        self.clip_logit: nn.Parameter | None = None
        if quantized and recipe.channel_scale != "none":
            self.log_scale = nn.Parameter(scale.log(), requires_grad=recipe.channel_scale == "learned")
        block = block_size(num_inputs, recipe.rotation_block)
        self.register_buffer("start", None)
        if quantized and recipe.rotation != "none" and block > 1:
            self.start = hadamard(block)
            self.skew = nn.Parameter(torch.zeros(block, block), requires_grad=recipe.rotation == "learned")
        if quantized:
            self.clip_logit = nn.Parameter(_logit(torch.ones(1)), requires_grad=recipe.clip == "learned")
        self._clips = quantized and recipe.clip == "learned"
        self._frozen: tuple[Tensor | None, Tensor | None] | None = None
        self._memo: tuple[weakref.ref[Tensor], Tensor] | None = None

    def parts(self) -> tuple[Tensor | None, Tensor | None]:
        """`(channel_scale [d], rotation [b, b])`, None where the group has none."""
        if self._frozen is not None:
            return self._frozen
        scale = None if self.log_scale is None else self.log_scale.exp()
        rotation = None if self.skew is None or self.start is None else self.start @ cayley(self.skew)
        return scale, rotation

    def clip(self) -> Tensor | float:
        """Clip of the activations' range, in (0, 1]."""
        return torch.sigmoid(self.clip_logit) if self._clips and self.clip_logit is not None else 1.0

    def transformed(self, x: Tensor) -> Tensor:
        """`x [..., d]` scaled and rotated, not quantized."""
        scale, rotation = self.parts()
        if scale is not None:
            x = x / scale.to(x.dtype)
        return x if rotation is None else rotate_blocks(x, rotation.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., d]` scaled, rotated and fake-quantized per token; computed once for all layers of the group."""
        if self._memo is not None and self._memo[0]() is x:
            return self._memo[1]
        out = self.transformed(x)
        if self.activation_bits < 16:
            out = fake_quantize(out, self.activation_bits, -1, self.clip())
        self._memo = (weakref.ref(x, lambda _: self.forget()), out)
        return out

    def forget(self) -> None:
        """Drops what is remembered of the last input."""
        self._memo = None

    def freeze(self) -> None:
        """Ends learning: the parts become constants in the precision in which they are stored."""
        scale, rotation = self.parts()
        self._frozen = (
            None if scale is None else scale.detach().float(),
            None if rotation is None else rotation.detach().to(torch.bfloat16).float(),
        )
        self.forget()


class CalibratedLinear(nn.Module):
    """A linear layer whose weight is fake-quantized while it is learned, and fixed on its grid after `fix`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, transform: GroupTransform, bits: LayerBits, recipe: Recipe) -> None:
        super().__init__()
        self.bits, self.layout = bits, recipe.weight_layout
        self.transform = transform
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.clip_logit: nn.Parameter | None = None
        if recipe.clip == "learned":
            start = best_clip(self.transformed_weight().detach(), bits.weight, self.layout)
            self.clip_logit = nn.Parameter(_logit(start))
        self._fixed: Tensor | None = None

    def transformed_weight(self) -> Tensor:
        """The weight `[n, d]`, float32, in the group's transformed coordinates."""
        scale, rotation = self.transform.parts()
        weight: Tensor = self.weight.float()
        if self.transform._frozen is not None:
            return transform_weight(weight, scale, rotation)
        if scale is not None:
            weight = weight * scale
        return weight if rotation is None else rotate_blocks(weight, rotation)

    def clip(self) -> Tensor | float:
        """Clip of the weights' range, `[n, 1]` in (0, 1), or 1."""
        return 1.0 if self.clip_logit is None else torch.sigmoid(self.clip_logit)

    def grid(self) -> WeightGrid:
        """The grid on which the transformed weight is rounded."""
        fit = fit_two_level if self.layout == "two_level" else fit_per_channel
        clip = self.clip()
        clip = clip.detach() if isinstance(clip, Tensor) else clip
        return fit(self.transformed_weight().detach(), self.bits.weight, clip)

    def fix(self, weight: Tensor) -> None:
        """From now on the layer computes with this transformed, dequantized weight `[n, d]`."""
        self._fixed = weight.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., d] -> [..., n]` in `x`'s dtype."""
        inputs = self.transform(x)
        if self._fixed is not None:
            weight = self._fixed
        else:
            weight = fake_quantize_weight(self.transformed_weight(), self.bits.weight, self.clip(), self.layout)
        return nn.functional.linear(inputs, weight.to(inputs.dtype), self.bias)


def best_clip(weight: Tensor, bits: int, layout: str) -> Tensor:
    """Per output channel the clip `[n, 1]` with the least squared rounding error, from 0.5 to 1 in steps of 0.025."""
    best = torch.full((weight.shape[0], 1), torch.inf, device=weight.device)
    clip = torch.ones_like(best)
    for candidate in turns(_CLIP_CANDIDATES, weight):
        rounded = fake_quantize_weight(weight, bits, torch.full_like(best, candidate), layout)
        error = (rounded - weight).square().sum(dim=1, keepdim=True)
        clip = torch.where(error < best, candidate, clip)
        best = torch.minimum(error, best)
    return clip


@dataclass
class CalibratedGroup:
    """One input group of a block under calibration."""

    name: str
    stream: str
    transform: GroupTransform
    layers: dict[str, CalibratedLinear]
    """By name inside the block; the first is the leader."""
