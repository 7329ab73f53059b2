"""``qk``: norm and rotary embedding of q and k in a buffer of q, k and v."""

from __future__ import annotations

import torch

from benchmarks.harness import Row
from benchmarks.kernels.bench import Bench, Options
from reelquant.ops.qk_norm_rope.kernel import launch_qk_norm_rope
from reelquant.ops.qk_norm_rope.reference import qk_norm_rope_reference


def measure(bench: Bench) -> None:
    """All tokens, in place."""
    sizes = bench.sizes
    joint, width = sizes.joint, sizes.width
    qkv = bench.loud(joint, 3 * width)
    angles = 100 * torch.rand(sizes.video, sizes.head_dim // 2, device=bench.device)
    angles = angles.repeat_interleave(2, dim=1)
    weights = [1 + 0.3 * bench.randn(sizes.head_dim) for _ in range(4)]
    others: Options = {
        "num_heads": sizes.heads,
        "norm_weights": tuple(weights[:2]),
        "text_norm_weights": tuple(weights[2:]),
        "rotary": (angles.cos(), angles.sin()),
        "eps": 1e-6,
    }
    num_bytes = 2 * (2 * joint * width * 2) + 2 * sizes.video * sizes.head_dim * 4

    def run() -> Row:
        expected = qk_norm_rope_reference(qkv.clone(), **others)[:, : 2 * width].float()
        found = launch_qk_norm_rope(qkv.clone(), **others)
        error = float((found[:, : 2 * width].float() - expected).norm() / expected.norm())
        # In place, again and again: what is normalized keeps its size.
        times = bench.timed(lambda: launch_qk_norm_rope(found, **others))
        return {**bench.moved(times, num_bytes), "relative_error": error}

    bench.add("qk", f"{joint} tokens, {sizes.heads} x {sizes.head_dim}", "default", run)
