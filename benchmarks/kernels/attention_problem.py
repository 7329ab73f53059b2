"""Tensors of attention's cases, how a case is measured, and how wrong a result is.

TFLOP/s count `4 D` FLOP a pair that the mask leaves (`2 D` for one pass of the column sums). Errors are relative, in the
Frobenius norm, on sampled query rows against float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Row, synchronize
from benchmarks.kernels.bench import Bench
from reelquant.ops.band_attention.reference import Correction
from reelquant.ops.token_order import place_major_positions
from reelquant.tokens import TokenLayout, visited_pairs

SAMPLED_ROWS = 48


class Problem(NamedTuple):
    """Queries, keys and values of all cases."""

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


def drawn(bench: Bench, *, loud: bool = False) -> Problem:
    """Random q, k, v `[H, L, D]`, the columns of `[L, 3 H D]`.

    Args:
        loud: every token of a head of root mean square 1, with four channels eight times as loud: in queries and keys by a
            mean, as in trained models; values have none, as a mean makes the relative error small.
    """
    layout, heads, head_dim = bench.sizes.layout, bench.sizes.heads, bench.sizes.head_dim
    generator = torch.Generator(bench.device).manual_seed(0)
    drawn = torch.randn((layout.num_tokens, 3, heads, head_dim), generator=generator, device=bench.device)
    q, k, v = drawn.to(bench.dtype).permute(1, 2, 0, 3)
    for x in (q, k, v) if loud else ():
        gain = torch.ones(head_dim, device=bench.device)
        gain[:: head_dim // 4] = 8
        mean = gain * torch.randn(heads, 1, head_dim, generator=generator, device=bench.device)
        wide = x.float() * gain if x is v else x.float() + mean
        x.copy_(wide * wide.square().mean(2, keepdim=True).rsqrt())
    return Problem(q, k, v, layout)


def add(bench: Bench, case: str, call: Callable[[], Any], flop: float, **settings: Any) -> None:
    """Measures one case of attention.

    Args:
        flop: of the pairs that the mask leaves.
        settings: `error` says how wrong a result is; `once` takes the first call's time, of a slow one that only serves as a
            comparison; all others are recorded: `density`, `kinds`, `corrections`.
    """
    error, once = settings.pop("error", None), settings.pop("once", False)

    def run() -> Row:
        begin = time.perf_counter()
        result = call()
        synchronize(bench.device)
        first_s = time.perf_counter() - begin
        wrong = None if error is None else error(result)
        del result
        times: Row = {"ms": 1e3 * first_s} if once else bench.timed(call)
        return {**times, "tflops": flop / times["ms"] / 1e9, "relative_error": wrong, "first_s": first_s}

    variant = ", ".join(f"{name} {value}" for name, value in settings.items()) or "default"
    bench.record.add({"group": "attention", "case": case, "variant": variant, **settings}, run)


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
