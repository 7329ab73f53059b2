"""Band masks of sparse attention (QuantSparse on Sparse VideoGen's masks, method §6).

Both head kinds are one mask, `|i - j| < width`, over the video tokens in two orders: frame-major (`spatial`: near frames) and
place-major (`temporal`: near places in all frames). Text tokens see all and are seen by all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.families.family import TokenLayout


def visited_pairs(layout: TokenLayout, width: int) -> int:
    """Pairs (query, key) that the mask leaves, of `num_tokens²`: the band, and all pairs with a text token."""
    video, tokens = layout.num_video, layout.num_tokens
    width = min(width, video)
    return video * (2 * width - 1) - width * (width - 1) + tokens**2 - video**2


def mask_density(layout: TokenLayout, width: int) -> float:
    """Share of the `L x L` map that a band of `width` visits, text included; exact."""
    return visited_pairs(layout, width) / layout.num_tokens**2


def band_width(layout: TokenLayout, density: float) -> int:
    """The widest band whose `mask_density` is at most `density`, 1 to `num_video`.

    Raises:
        ValueError: `density` is not in (0, 1], or even a band of one token (each token sees itself and the text) is denser.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be above 0 and at most 1 (1 is dense attention)")
    narrowest = mask_density(layout, 1)
    if narrowest > density:
        raise ValueError(
            f"density {density} is narrower than one token: with {layout.num_text} text tokens, which stay dense, and "
            f"{layout.num_video} video tokens a band of one token has density {narrowest:.4f}; raise density to at least that"
        )
    low, high = 1, layout.num_video
    while low < high:
        middle = (low + high + 1) // 2
        if mask_density(layout, middle) <= density:
            low = middle
        else:
            high = middle - 1
    return low


def place_major_order(layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor:
    """`[num_video]` int64: `x[order]` puts frame-major video tokens into place-major order."""
    places = layout.height * layout.width
    order = torch.arange(layout.num_video, device=device).view(layout.num_frames, places)
    return order.T.reshape(-1)


def place_major_positions(layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor:
    """`[num_video]` int64: place-major position of every frame-major token; the inverse of `place_major_order`."""
    places = layout.height * layout.width
    token = torch.arange(layout.num_video, device=device)
    return token % places * layout.num_frames + token // places
