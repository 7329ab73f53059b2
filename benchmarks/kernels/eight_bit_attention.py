"""``eight_bit``: attention in 8 bits by density, dense and in one pass, corrected, beside 16 bits, and its quantization apart,
which other cases leave out; queries, keys and values of norm 1 with a few loud channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.kernels.attention_problem import Problem, add, drawn, mixed, sampled_error, worse_of_both
from benchmarks.kernels.band_attention import add_band, add_dense, corrections_of
from benchmarks.kernels.bench import Bench
from reelquant.ops.band_attention.reference import Correction
from reelquant.ops.eight_bit_attention.launch import (
    eight_bit_attention_triton,
    eight_bit_dense_and_band_triton,
    quantize_keys_values_triton,
)
from reelquant.ops.eight_bit_attention.op import eight_bit_attention
from reelquant.ops.eight_bit_attention.reference import KeysValues
from reelquant.tokens import band_width

DENSITY = 0.15


def measure(bench: Bench) -> None:
    """All cases on the same tensors."""
    problem = drawn(bench, loud=True)
    q, k, v, layout = problem
    kinds, width = mixed(bench.sizes.heads, "st"), band_width(layout, DENSITY)
    quantize: Callable[..., KeysValues] = partial(quantize_keys_values_triton, k, v, kinds=kinds, layout=layout)
    kept = quantize(precision="int8_fp8")
    add_band(bench, problem, DENSITY, "st")
    for density in (DENSITY, 0.25, 1.0):
        _add(bench, problem, kept, density)
    both = [sampled_error(problem, kinds, one) for one in (layout.num_video, width)]
    add(
        bench,
        "one pass int8_fp8",
        partial(eight_bit_dense_and_band_triton, q, kept, width=width),
        problem.dense_flop,
        density=DENSITY,
        kinds="st",
        error=partial(worse_of_both, *both),
    )
    add(bench, "quantize int8_fp8", partial(quantize, precision="int8_fp8"), 0.0)
    terms = corrections_of(problem)
    for num in (1, 2):
        _add(bench, problem, kept, DENSITY, corrections=terms[:num])
    add(
        bench,
        "quantize + int8_fp8",
        lambda: eight_bit_attention_triton(q, quantize(precision="int8_fp8"), width=width),
        problem.band_flop(width),
        density=DENSITY,
        kinds="st",
        error=sampled_error(problem, kinds, width),
    )
    add_dense(bench, problem)
    for density in (DENSITY, 1.0):
        _add(bench, problem, kept, density, name="reference int8_fp8", implementation="reference")
    del kept
    wide = quantize(precision="int8_16")
    for density in (DENSITY, 1.0):
        _add(bench, problem, wide, density, precision="int8_16")


def _add(
    bench: Bench,
    problem: Problem,
    kept: KeysValues,
    density: float,
    *,
    corrections: tuple[Correction, ...] = (),
    precision: str = "int8_fp8",
    name: str | None = None,
    **options: Any,
) -> None:
    """Attention under the band of a density, or dense with density 1; with `name` by the op itself, once."""
    width = problem.layout.num_video if density == 1 else band_width(problem.layout, density)
    run: Callable[..., Any] = eight_bit_attention if name else eight_bit_attention_triton
    add(
        bench,
        name or f"{'dense' if density == 1 else 'band'} {precision}",
        partial(run, problem.q, kept, width=width, corrections=corrections, **options),
        problem.band_flop(width),
        density=density,
        kinds="st",
        corrections=len(corrections),
        error=sampled_error(problem, kept.kinds, width, corrections),
        once=name is not None,
    )
