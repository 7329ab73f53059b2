"""``expansion``: stored weights to INT8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Row
from benchmarks.kernels.bench import Bench
from reelquant.ops.weight_expansion.kernel import launch_expand_weight
from reelquant.ops.weight_expansion.reference import expand_weight_reference


def measure(bench: Bench) -> None:
    """Weights of 4 and 6 bits, by their shape."""
    width = bench.sizes.width
    for bits in (4, 6):
        for n, d in [(width, width), (3 * width, width), (width, 4 * width), (width, 5 * width), (7 * width, width)]:
            bench.add("expansion", f"{bits} bits {n}x{d}", "default", partial(_expanded, bench, bits, n, d))


def _expanded(bench: Bench, bits: int, n: int, d: int) -> Row:
    packed = torch.randint(0, 256, (n, d // 8 * bits), device=bench.device, dtype=torch.uint8)
    scale = torch.randint(1, 5, (n, d // 64), device=bench.device, dtype=torch.uint8)
    outs = [torch.full((n, d), 99, device=bench.device, dtype=torch.int8) for _ in range(bench.num_copies(n * d))]
    calls: list[Callable[[], object]] = [
        partial(launch_expand_weight, packed.clone(), bits=bits, group_scale=scale, out=out) for out in outs
    ]
    for call in calls:
        call()
    expected = expand_weight_reference(packed, bits=bits, group_scale=scale, out=torch.empty_like(outs[0]))
    exact = all(torch.equal(out, expected) for out in outs)
    figures = bench.moved(bench.timed_in_graph(calls), packed.nbytes + scale.nbytes + n * d)
    return {**figures, "exact": exact}
