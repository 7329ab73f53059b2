"""What the cases share: their form, random tensors, and how wrong a result is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reelquant.ops.band_attention.reference import Correction
from reelquant.ops.token_order import place_major_positions
from reelquant.tokens import TokenLayout, visited_pairs

SAMPLED_ROWS = 48


@dataclass
class Case:
    """One measurement: `call` gives a tensor (or tensors) of which `error` says how wrong they are."""

    name: str
    call: Callable[[], Any]
    flop: float
    error: Callable[[Any], float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    once: bool = False
    """Slow and only for comparison: its first call counts."""


class Problem(NamedTuple):
    """What all cases share."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout

    @property
    def dense_flop(self) -> float:
        heads, tokens, head_dim = self.q.shape
        return 4.0 * tokens**2 * heads * head_dim

    def band_flop(self, width: int) -> float:
        return 4.0 * visited_pairs(self.layout, width) * self.q.shape[0] * self.q.shape[2]


def drawn(layout: TokenLayout, heads: int, head_dim: int, device: torch.device) -> Problem:
    """Random q, k, v `[H, L, D]`, the columns of `[L, 3 H D]`."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    shape = (layout.num_tokens, 3, heads, head_dim)
    q, k, v = torch.randn(shape, generator=generator, device=device).to(dtype).permute(1, 2, 0, 3)
    return Problem(q, k, v, layout)


def loud(layout: TokenLayout, heads: int, head_dim: int, device: torch.device) -> Problem:
    """Like `drawn`, but every token of a head of root mean square 1, with four channels eight times as loud.

    In queries and keys they are loud by a mean, as in trained models. Values have none: a mean makes the relative error small.
    """
    q, k, v, _ = drawn(layout, heads, head_dim, device)
    generator = torch.Generator(device).manual_seed(2)
    for x in (q, k, v):
        gain = torch.ones(head_dim, device=device)
        gain[:: head_dim // 4] = 8
        mean = gain * torch.randn(heads, 1, head_dim, generator=generator, device=device)
        wide = x.float() * gain if x is v else x.float() + mean
        x.copy_(wide * wide.square().mean(2, keepdim=True).rsqrt())
    return Problem(q, k, v, layout)


def mixed(heads: int, mix: str) -> str:
    """The heads' kinds for `s`, `t` or `st` (half and half)."""
    return (mix * heads)[:heads]


def sampled_error(
    problem: Problem, kinds: str, width: int, corrections: tuple[Correction, ...] = ()
) -> Callable[..., float]:
    """Relative error of an attention `[H, L, D]` on sampled rows, first and last of the video and the text among them."""
    q, k, v, layout = problem
    n, tokens = layout.num_video, layout.num_tokens
    generator = torch.Generator().manual_seed(1)
    inner = torch.randint(tokens, (SAMPLED_ROWS,), generator=generator).tolist()
    rows = torch.tensor(sorted({0, n // 2, n - 1, min(n, tokens - 1), tokens - 1, *inner}), device=q.device)

    def error(out: Tensor) -> float:
        wrong, size = 0.0, 0.0
        for head, kind in enumerate(kinds):
            places = torch.arange(n, device=q.device)
            if kind == "t":
                places = place_major_positions(layout, q.device)
            video = rows.clamp(max=n - 1)
            far = (places[video][:, None] - places[None, :]).abs() >= width
            mask = torch.zeros(len(rows), tokens, dtype=torch.bool, device=q.device)
            mask[:, :n] = far & (rows < n)[:, None]
            scores = q[head, rows].double() @ k[head].double().T / q.shape[2] ** 0.5
            expected = scores.masked_fill(mask, float("-inf")).softmax(1) @ v[head].double()
            for term in corrections:
                expected += term.scale * (term.rows[head, rows].double() @ term.directions[head].double().T)
            wrong += float((out[head, rows].double() - expected).square().sum())
            size += float(expected.square().sum())
        return float((wrong / size) ** 0.5)

    return error


def worse_of_both(of_dense: Callable[[Tensor], float], of_band: Callable[[Tensor], float], both: Any) -> float:
    """Of a pair (dense, band)."""
    return max(of_dense(both[0]), of_band(both[1]))
