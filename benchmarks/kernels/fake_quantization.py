"""``fake``: fake quantization of a learning step, forward and both ways, beside torch. Bytes are those of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Row
from benchmarks.kernels.bench import Bench
from reelquant.ops.implementation import reference_only
from reelquant.quantization.quantizer import fake_quantize
from reelquant.quantization.weight_grid import fake_quantize_weight

Run = Callable[[Tensor, Tensor], Tensor]
RUNS: dict[str, Run] = {
    "rows": lambda x, clip: fake_quantize(x, 6, -1, clip),
    "two levels": lambda x, clip: fake_quantize_weight(x, 4, clip, "two_level"),
}


def measure(bench: Bench) -> None:
    """Activations a row, and weights in two levels."""
    joint, width = bench.sizes.joint, bench.sizes.width
    for kind, rows, d in [("rows", joint, width), ("rows", joint, 4 * width), ("two levels", 4 * width, width)]:
        x = bench.loud(rows, d) if kind == "rows" else bench.randn(rows, d, dtype=torch.float32)
        for both in (False, True):
            case = f"{kind} {rows}x{d}{', with gradients' if both else ''}"
            for variant in ("default", "torch"):
                call = partial(_quantized, bench, x, kind, both=both, kernels=variant == "default")
                bench.add("fake", case, variant, call)
        del x, call
        bench.free()


def _quantized(bench: Bench, x: Tensor, kind: str, *, both: bool, kernels: bool) -> Row:
    clip = torch.full((1,) if kind == "rows" else (len(x), 1), 0.9, device=bench.device)
    learned, grad = [x.requires_grad_(), clip.requires_grad_()], torch.randn_like(x)

    def call() -> tuple[Tensor, ...]:
        out = RUNS[kind](x, clip)
        return torch.autograd.grad(out, learned, grad) if both else (out.detach(),)

    with reference_only():
        expected = call()
    with nullcontext() if kernels else reference_only():
        errors = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(call(), expected, strict=True)]
        times = bench.timed(call)
    return {**bench.moved(times, x.nbytes * (5 if both else 2)), "relative_error": max(errors)}
