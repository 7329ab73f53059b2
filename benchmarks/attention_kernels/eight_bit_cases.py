"""Cases in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.attention_kernels.cases import band_case, dense_cases
from benchmarks.attention_kernels.problem import Case, Problem, mixed, sampled_error, worse_of_both
from reelquant.ops.band_attention.reference import Correction
from reelquant.ops.eight_bit_attention import launch as eight_bit
from reelquant.ops.eight_bit_attention.op import eight_bit_attention
from reelquant.ops.eight_bit_attention.reference import KeysValues, Precision
from reelquant.tokens import band_width


def eight_bit_cases(problem: Problem, rows: list[dict[str, Any]]) -> Iterator[Case]:
    """`rows`: of the cases so far, which say the fastest tile."""
    q, k, v, layout = problem
    heads, _, head_dim = q.shape
    kinds, width = mixed(heads, "st"), band_width(layout, 0.15)
    options: dict[str, Any] = {"kinds": kinds, "layout": layout}
    kept = eight_bit.quantize_keys_values_triton(k, v, precision="int8_fp8", **options)
    yield band_case(problem, 0.15, "st")
    tiles = eight_bit.TILES[head_dim]
    for tile in tiles:
        yield eight_bit_band(problem, kept, 0.15, tile)
    done = [row for row in rows if row["case"] == "band int8_fp8" and row["ms"]]
    done.sort(key=lambda row: float(row["ms"]))
    best = [eight_bit.EightBitTile(**row["tile"]) for row in done[:2]] or [tiles[0]]
    yield eight_bit_both(problem, kept, 0.15, best[0])
    yield eight_bit_band(problem, kept, 1.0, best[0])
    call = partial(eight_bit.quantize_keys_values_triton, k, v, precision="int8_fp8", **options)
    yield Case("quantize int8_fp8", call, 0.0)
    yield eight_bit_band(problem, kept, 0.25, best[0])
    terms = tuple(
        Correction(torch.randn_like(q[..., :16]), torch.randn(heads, head_dim, 16, device=q.device), scale)
        for scale in (1.0, 0.5)
    )
    for num in (1, 2):
        yield eight_bit_band(problem, kept, 0.15, best[0], corrections=terms[:num])
    yield Case(
        "quantize + int8_fp8",
        lambda: eight_bit.eight_bit_attention_triton(q, call(), width=width, tile=best[0]),
        problem.band_flop(width),
        sampled_error(problem, kinds, width),
        {"density": 0.15, "kinds": "st", "tile": best[0]},
    )
    yield from dense_cases(problem, fa2=False)
    for tile in [x for x in tiles if x not in best][:2]:
        yield eight_bit_both(problem, kept, 0.15, tile)
    yield eight_bit_band(problem, kept, 1.0, best[-1])
    for density in (0.15, 1.0):
        width_of = layout.num_video if density == 1 else width
        yield Case(
            "reference int8_fp8",
            partial(eight_bit_attention, q, kept, width=width_of, implementation="reference"),
            problem.band_flop(width_of),
            sampled_error(problem, kinds, width_of),
            {"density": density, "kinds": "st"},
            once=True,
        )
    del kept
    wide = eight_bit.quantize_keys_values_triton(k, v, precision="int8_16", **options)
    for tile in (eight_bit.EightBitTile(64, 64, 4, 3), eight_bit.EightBitTile(128, 64, 8, 3)):
        yield eight_bit_band(problem, wide, 0.15, tile, precision="int8_16")
    yield eight_bit_band(problem, wide, 1.0, eight_bit.EightBitTile(64, 64, 4, 3), precision="int8_16")


def eight_bit_band(
    problem: Problem,
    kept: KeysValues,
    density: float,
    tile: eight_bit.EightBitTile,
    *,
    corrections: tuple[Correction, ...] = (),
    precision: Precision = "int8_fp8",
) -> Case:
    width = problem.layout.num_video if density == 1 else band_width(problem.layout, density)
    call = partial(
        eight_bit.eight_bit_attention_triton, problem.q, kept, width=width, tile=tile, corrections=corrections
    )
    settings = {"density": density, "kinds": "st", "tile": tile, "corrections": len(corrections)}
    error = sampled_error(problem, kept.kinds, width, corrections)
    name = f"dense {precision}" if density == 1 else f"band {precision}"
    return Case(name, call, problem.band_flop(width), error, settings)


def eight_bit_both(problem: Problem, kept: KeysValues, density: float, tile: eight_bit.EightBitTile) -> Case:
    width = band_width(problem.layout, density)
    of_dense = sampled_error(problem, kept.kinds, problem.layout.num_video)
    of_band = sampled_error(problem, kept.kinds, width)
    call = partial(eight_bit.eight_bit_dense_and_band_triton, problem.q, kept, width=width, tile=tile)
    settings = {"density": density, "kinds": "st", "tile": tile}
    return Case("one pass int8_fp8", call, problem.dense_flop, partial(worse_of_both, of_dense, of_band), settings)
