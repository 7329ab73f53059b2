"""The place-major order of video tokens, in which temporal heads have their band."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.tokens import TokenLayout


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
