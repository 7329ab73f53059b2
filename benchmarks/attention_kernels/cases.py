"""Cases in 16 bits: dense, under the band, corrected, both in one pass, column sums, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_kernels.problem import Case, Problem, mixed, sampled_error, worse_of_both
from reelquant.ops.band_attention.launch import TILES, Load, Tile, band_attention_triton, dense_and_band_triton
from reelquant.ops.band_attention.reference import Correction, corrected
from reelquant.ops.column_sums import kernel as sums_kernel
from reelquant.ops.column_sums.op import column_sums
from reelquant.tokens import band_width


def dense_by(problem: Problem, backend: SDPBackend) -> Callable[[], Tensor]:
    """[H, L, D] by one backend of torch; it raises where that backend does not take the tensors."""
    q, k, v = (x.unsqueeze(0) for x in problem[:3])

    def call() -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v)[0]

    return call


def dense_cases(problem: Problem, *, fa2: bool) -> Iterator[Case]:
    heads = problem.q.shape[0]
    error = sampled_error(problem, "s" * heads, problem.layout.num_video)
    yield Case("dense cudnn", dense_by(problem, SDPBackend.CUDNN_ATTENTION), problem.dense_flop, error)
    if fa2:
        yield Case("dense fa2", dense_by(problem, SDPBackend.FLASH_ATTENTION), problem.dense_flop, error)


def band_case(
    problem: Problem, density: float, mix: str, *, tile: Tile | None = None, load: Load | None = None
) -> Case:
    kinds, width = mixed(problem.q.shape[0], mix), band_width(problem.layout, density)
    settings: dict[str, Any] = {"density": density, "kinds": mix, "tile": tile, "load": load}

    def call() -> Tensor:
        return band_attention_triton(
            problem.q, problem.k, problem.v, kinds=kinds, layout=problem.layout, width=width, tile=tile, load=load
        )

    return Case("band triton", call, problem.band_flop(width), sampled_error(problem, kinds, width), settings)


def sweep(problem: Problem, *, quick: bool) -> Iterator[Case]:
    """Tiles and loads at density 0.15."""
    tiles = TILES[problem.q.shape[2]]
    for tile in tiles[:3] if quick else tiles:
        for mix in ("s", "t"):
            yield band_case(problem, 0.15, mix, tile=tile)
    for tile in tiles[1:2] if quick else tiles[:3]:
        yield band_case(problem, 0.15, "t", tile=tile, load="pointers")
    if not quick:
        yield band_case(problem, 0.15, "s", tile=tiles[0], load="pointers")


def densities(problem: Problem, tile: Tile | None, *, quick: bool) -> Iterator[Case]:
    for density in (0.15, 0.25) if quick else (0.15, 0.25, 0.4):
        for mix in ("st",) if quick else ("s", "t", "st"):
            if density > 0.15 or mix == "st":
                yield band_case(problem, density, mix, tile=tile)


def corrected_cases(problem: Problem, tile: Tile | None) -> Iterator[Case]:
    heads, tokens, head_dim = problem.q.shape
    kinds, width = mixed(heads, "st"), band_width(problem.layout, 0.15)
    terms = tuple(
        Correction(
            torch.randn_like(problem.q[..., :16]), torch.randn(heads, head_dim, 16, device=problem.q.device), scale
        )
        for scale in (1.0, 0.5)
    )
    options: dict[str, Any] = {"kinds": kinds, "layout": problem.layout, "width": width, "tile": tile}
    for num in (1, 2):
        flop = problem.band_flop(width) + 2.0 * num * heads * tokens * head_dim * 16
        error = sampled_error(problem, kinds, width, terms[:num])
        settings = {"density": 0.15, "kinds": "st", "tile": tile, "corrections": num}

        def call(num: int = num) -> Tensor:
            return band_attention_triton(*problem[:3], corrections=terms[:num], **options)

        yield Case("band corrected", call, flop, error, settings)
    yield Case(
        "band, then corrected",
        lambda: corrected(band_attention_triton(*problem[:3], **options), terms[:1]),
        problem.band_flop(width),
        None,
        {"density": 0.15, "kinds": "st", "tile": tile, "corrections": 1},
    )


def refresh_cases(problem: Problem, *, quick: bool) -> Iterator[Case]:
    heads = problem.q.shape[0]
    width = band_width(problem.layout, 0.15)
    for mix in ("st",) if quick else ("s", "st"):
        kinds = mixed(heads, mix)
        of_dense = sampled_error(problem, kinds, problem.layout.num_video)
        of_band = sampled_error(problem, kinds, width)
        for tile in TILES[problem.q.shape[2]][: 1 if quick else 2]:
            options: dict[str, Any] = {"kinds": kinds, "layout": problem.layout, "width": width, "tile": tile}
            yield Case(
                "refresh, one pass",
                partial(dense_and_band_triton, *problem[:3], **options),
                problem.dense_flop,
                partial(worse_of_both, of_dense, of_band),
                {"density": 0.15, "kinds": mix, "tile": tile},
            )


def sums_cases(problem: Problem, *, quick: bool) -> Iterator[Case]:
    q, k, half = problem.q, problem.k, problem.dense_flop / 2
    lse = sums_kernel.row_normalizers(q, k)
    expected = column_sums(q, k, implementation="reference").double()

    def error(sums: Tensor) -> float:
        return float((sums.double() - expected).norm() / expected.norm())

    tiles = sums_kernel.TILES[q.shape[2]]
    for tile in tiles[:3] if quick else tiles:
        settings = {"tile": tile}
        yield Case("sums pass 1", partial(sums_kernel.row_normalizers, q, k, tile=tile), half, None, settings)
        call = partial(sums_kernel.key_sums, q, k, lse, tile=tile)
        yield Case("sums pass 2", call, half, lambda sums: error(sums.sum(0, dtype=torch.float64)), settings)
    yield Case("sums", lambda: sums_kernel.column_sums_triton(q, k), 2 * half, error)
    if not quick:
        yield Case("sums reference", lambda: column_sums(q, k, implementation="reference"), 2 * half, once=True)


def flex_cases(problem: Problem, *, quick: bool) -> Iterator[Case]:
    from reelquant.ops.band_attention.flex import band_attention_flex

    kinds = "s" * problem.q.shape[0]
    for density in (0.15,) if quick else (0.15, 0.25):
        width = band_width(problem.layout, density)
        options: dict[str, Any] = {"kinds": kinds, "layout": problem.layout, "width": width}
        yield Case(
            "band flex",
            partial(band_attention_flex, *problem[:3], **options),
            problem.band_flop(width),
            sampled_error(problem, kinds, width),
            {"density": density, "kinds": "s"},
        )
