"""Start of the learned channel scale: moves the outliers of the input channels into the weights."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_CHANNEL_SCALE = 1e-5
LARGEST_CHANNEL_SCALE = 1e5


def smoothing_scale(activation_amax: Tensor, weight_amax: Tensor, alpha: float = 0.5) -> Tensor:
    """`activation_amax**alpha / weight_amax**(1 - alpha)` (SmoothQuant, arXiv 2211.10438, eq. 4): x is divided by it.

    Args:
        activation_amax: [d], max|x| of every input channel.
        weight_amax: [d], max|W| of every weight column, over all layers that read the tensor.
        alpha: 0..1, how much of the difficulty moves into the weights.

    Returns: float32 [d], within 1e-5..1e5; 1 where the channel or its weights are zero throughout.
    Raises: ValueError for other shapes, negative, NaN or infinite maxima, or `alpha` outside 0..1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha!r}")
    if activation_amax.ndim != 1 or activation_amax.shape != weight_amax.shape:
        raise ValueError(
            "activation_amax and weight_amax must both be [d], "
            f"got {tuple(activation_amax.shape)} and {tuple(weight_amax.shape)}"
        )
    for name, amax in (("activation_amax", activation_amax), ("weight_amax", weight_amax)):
        sound = amax.isfinite() & (amax >= 0)
        if not bool(sound.all()):
            bad = ~sound
            channel = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} must be finite and not negative, got {float(amax[channel])} in channel {channel} "
                f"({int(bad.sum())} such channels)"
            )
    activation, weight = activation_amax.double(), weight_amax.double()
    alive = (activation > 0) & (weight > 0)
    scale = torch.where(alive, activation, 1.0) ** alpha / torch.where(alive, weight, 1.0) ** (1.0 - alpha)
    return scale.clamp(SMALLEST_CHANNEL_SCALE, LARGEST_CHANNEL_SCALE).float()
