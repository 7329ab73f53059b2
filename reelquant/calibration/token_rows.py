"""Which tokens a step of the distillation sees: a random share of the video's, all of the text's.

The block loss is a mean over tokens (S²Q-VDiT eq. 12), so a part of them estimates it, and its gradient, without bias. The
video tokens are cut into strata, runs of one size up to one token; one token is drawn in each and stands for its stratum.
Neighbours are alike, so strata leave less variance than as many tokens drawn anywhere; and since all strata start at a random
place (the order is a circle), each token is as likely to be drawn as any other.

Text tokens are few (HunyuanVideo: 256 of 57,856): leaving any out would save nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant.tokens import TokenLayout


@dataclass(frozen=True)
class TokenRows:
    """The tokens of one step."""

    indices: Tensor
    """int64 `[R]`, ascending, without repetition; the last `layout.num_text` are the text tokens."""
    counts: Tensor
    """float32 `[R]`: how many tokens each stands for; they add up to `num_tokens`."""
    num_tokens: int
    """All tokens, L."""

    def to(self, device: torch.device) -> TokenRows:
        """The same on `device`."""
        return TokenRows(self.indices.to(device), self.counts.to(device), self.num_tokens)

    def mean(self, values: Tensor) -> Tensor:
        """Estimate of a mean over all tokens from `values [R]` at these: what each stands for counts."""
        return (values * self.counts).sum() / self.num_tokens


def token_rows(layout: TokenLayout, fraction: float, *, seed: int) -> TokenRows | None:
    """Draws `round(fraction * num_video)` video tokens, at least one; None where that is all of them.

    Args:
        fraction: in (0, 1].
        seed: the only source of randomness: drawn on the CPU, the same on every device.
    """
    num_video, total = layout.num_video, layout.num_tokens
    num = max(1, round(fraction * num_video))
    if num >= num_video:
        return None
    generator = torch.Generator("cpu").manual_seed(seed % 2**63)
    bounds = torch.arange(num + 1, device="cpu") * num_video // num
    sizes = bounds.diff()
    inside = torch.rand(num, generator=generator, dtype=torch.float64, device="cpu") * sizes
    start = int(torch.randint(num_video, (1,), generator=generator, device="cpu"))
    drawn = (bounds[:-1] + inside.long() + start) % num_video
    first = -int(drawn.argmin())
    text = torch.arange(num_video, total, device="cpu")
    return TokenRows(
        torch.cat([drawn.roll(first), text]),
        torch.cat([sizes.roll(first).float(), torch.ones(len(text), device="cpu")]),
        total,
    )
