"""The grid of a video's tokens, and band masks over them (QuantSparse on Sparse VideoGen's masks, method §6).

Both head kinds are one mask, `|i - j| < width`, over the video tokens in two orders: frame-major (`spatial`: near frames) and
place-major (`temporal`: near places in all frames). Text tokens see all and are seen by all; so do those of an image's frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Grid = tuple[int, int, int]
"""Frames, rows and columns of the video tokens."""


@dataclass(frozen=True)
class TokenLayout:
    """Grid of the video tokens (frame-major) and the number of text tokens after them."""

    num_frames: int
    height: int
    width: int
    num_text: int
    dense_frames: int = 0
    """First frames whose tokens see all and are seen by all."""

    @property
    def grid(self) -> Grid:
        """Of the video tokens."""
        return self.num_frames, self.height, self.width

    @property
    def num_dense(self) -> int:
        """Number of tokens of the dense frames."""
        return self.dense_frames * self.height * self.width

    @property
    def banded(self) -> TokenLayout:
        """The layout of the tokens rolled by `num_dense`: dense frames stand behind the others, as if they were text."""
        frames, num_text = self.num_frames - self.dense_frames, self.num_text + self.num_dense
        return replace(self, num_frames=frames, num_text=num_text, dense_frames=0)

    @property
    def num_video(self) -> int:
        """Number of video tokens."""
        return self.num_frames * self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Number of all tokens."""
        return self.num_video + self.num_text


def visited_pairs(layout: TokenLayout, width: int) -> int:
    """Pairs (query, key) that the mask leaves, of `num_tokens²`: the band, and all pairs with a text token."""
    layout = layout.banded
    video, tokens = layout.num_video, layout.num_tokens
    width = min(width, video)
    return video * (2 * width - 1) - width * (width - 1) + tokens**2 - video**2


def mask_density(layout: TokenLayout, width: int) -> float:
    """Share of the `L x L` map that a band of `width` visits, text included; exact."""
    return visited_pairs(layout, width) / layout.num_tokens**2


def band_width(layout: TokenLayout, density: float) -> int:
    """The widest band whose `mask_density` is at most `density`, 1 to the number of video tokens that have one.

    Raises:
        ValueError: `density` is not in (0, 1], or even a band of one token (each token sees itself and the text) is denser.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be above 0 and at most 1 (1 is dense attention)")
    dense = f"{layout.num_text} text tokens" + (f" and {layout.num_dense} of an image" if layout.num_dense else "")
    layout = layout.banded
    narrowest = mask_density(layout, 1)
    if narrowest > density:
        raise ValueError(
            f"density {density} is narrower than one token: with {dense}, which stay dense, and "
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
