"""Weights and streams for speed and memory at full size: random, with the outliers that real ones have."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import ROOT

HUNYUAN_VIDEO = ROOT / "configs" / "models" / "hunyuanvideo-13b" / "transformer" / "config.json"
OUTLIER_EVERY = 97
"""One input channel of so many is an outlier."""
OUTLIER_FACTOR = 12.0


def transformer_config() -> dict[str, Any]:
    """HunyuanVideo-13B's, as diffusers names its fields."""
    config: dict[str, Any] = json.loads(HUNYUAN_VIDEO.read_text(encoding="utf-8"))
    return config


@torch.no_grad()
def fill_randomly(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draws all parameters in place: matrices with rows of different size that keep the scale of their input, and some
    columns much larger; vectors near 1 (norms) or near 0 (biases)."""
    for index, (name, parameter) in enumerate(module.named_parameters()):
        generator = torch.Generator(parameter.device).manual_seed(seed * 1_000_003 + index)
        values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        if parameter.ndim < 2:
            values = 1 + 0.1 * values if name.endswith("weight") else 0.02 * values
        else:
            rows = torch.rand(parameter.shape[0], generator=generator, device=parameter.device)
            values *= 0.5 * parameter[0].numel() ** -0.5 * torch.exp2(2 * rows - 1).view(-1, *[1] * (values.ndim - 1))
            values[:, ::OUTLIER_EVERY] *= 2
        parameter.copy_(values)
    return module


def random_stream(num_tokens: int, width: int, *, seed: int, device: torch.device | str) -> Tensor:
    """`[num_tokens, width]` bf16: a residual stream with outlier channels."""
    generator = torch.Generator(device).manual_seed(seed)
    stream = torch.randn(num_tokens, width, generator=generator, device=device)
    stream[:, ::OUTLIER_EVERY] *= OUTLIER_FACTOR
    return stream.bfloat16()
