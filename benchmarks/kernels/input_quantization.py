"""``input``: from norm to codes of 8 bits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Row
from benchmarks.kernels.bench import Bench, Options
from reelquant.ops.input_quantization.kernel import launch_quantize_input
from reelquant.ops.input_quantization.op import Norm
from reelquant.ops.input_quantization.reference import quantize_input_reference
from reelquant.quantization.rotation import hadamard


def measure(bench: Bench) -> None:
    """Inputs of the block's layers; the one that a norm writes with and without rotation."""
    width = bench.sizes.width
    for d, rotated in ((width, True), (4 * width, True), (5 * width, True), (width, False)):
        x = bench.loud(bench.sizes.joint, d)
        vectors = (bench.randn(d, dtype=torch.float32) for _ in range(2))
        norm = Norm(1e-6, 1 + 0.3 * next(vectors), 0.2 * next(vectors)) if d == width else None
        others: Options = {
            "bits": 8,
            "channel_scale": torch.rand(d, device=bench.device) + 0.5,
            "rotation": hadamard(128).to(bench.device, bench.dtype) if rotated else None,
            "clip": torch.tensor([0.95], device=bench.device),
            "norm": norm,
        }
        case = f"{d}{', norm' if d == width else ''}{', rotation 128' if rotated else ''}"
        bench.add("input", case, "default", partial(_quantized, bench, x, others))


def _quantized(bench: Bench, x: Tensor, others: Options) -> Row:
    codes, scale = launch_quantize_input(x, **others)
    rows = slice(-600, None)
    expected, expected_scale = quantize_input_reference(x[rows], **others)
    beside = (codes[rows].int() - expected.int()).abs()
    times = bench.timed(lambda: launch_quantize_input(x, **others))
    return {
        **bench.moved(times, x.nbytes + codes.nbytes + scale.nbytes),
        "codes_beside": float((beside > 0).float().mean()),
        "largest_difference": int(beside.max()),
        "relative_error": float((scale[rows] / expected_scale - 1).abs().max()),
    }
