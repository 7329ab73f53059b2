"""Compiles launches of kernels for a GPU that is not here: `python ahead_of_time.py 120 CASE …`.

A driver that only names the target stands in for CUDA's, and a launch compiles and stops. Tensors lie on the CPU, not
initialized, of shapes that are specialized as on a GPU. Printed: JSON, `{case: [bytes of shared memory of each kernel]}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from reelquant.ops.band_attention import launch as band
from reelquant.ops.band_attention.reference import Correction
from reelquant.ops.column_sums import kernel as column_sums
from reelquant.ops.eight_bit_attention import launch as eight_bit
from reelquant.ops.eight_bit_attention.reference import KeysValues
from reelquant.ops.int8_linear import launch as linear
from reelquant.ops.residual_factorization import kernel as factorization
from reelquant.ops.residual_factorization.reference import Factors
from reelquant.tokens import TokenLayout

LAYOUT, HEADS, TOKENS, LENGTH = TokenLayout(16, 15, 16, 256), 16, 4096, 4096
ON_A_GPU: dict[str, dict[str, Any]] = {
    "int8_linear_kernel": {"FAST": True},
    "_grams": {"PRODUCT": tl.bfloat16},
    "_project": {"PRODUCT": tl.bfloat16},
}
"""Compiled differently for tensors on a CPU."""


class Target:
    """As much of a driver as a compilation asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def half(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def qkv(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    whole = half(TOKENS, 3 * HEADS * head_dim)
    q, k, v = (x.unflatten(1, (HEADS, head_dim)).transpose(0, 1) for x in whole.chunk(3, dim=1))
    return q, k, v


def corrections(head_dim: int) -> list[Correction]:
    codes = torch.zeros(HEADS, TOKENS, 16, dtype=torch.int8)
    return [Correction(codes, torch.zeros(HEADS, head_dim, 16), 1.0, half(HEADS, TOKENS // 128, 16)) for _ in range(2)]


def linear_case(config: linear.Config, dtype: torch.dtype = torch.bfloat16) -> None:
    codes, weight = torch.empty(2, TOKENS, 3072, dtype=torch.int8)
    out = torch.empty(TOKENS, TOKENS, dtype=dtype)
    linear.launch_int8_linear(
        codes, torch.empty(TOKENS), weight, torch.empty(TOKENS), half(TOKENS),
        activation=None, gate=half(TOKENS), residual=out, out=out, config=config,
    )  # fmt: skip


def band_case(tile: band.Tile, head_dim: int, load: band.Load) -> None:
    tensors = qkv(head_dim)
    options: dict[str, Any] = {"layout": LAYOUT, "width": 700, "tile": tile, "load": load}
    band.band_attention_triton(*tensors, kinds="st" * (HEADS // 2), corrections=corrections(head_dim), **options)
    band.dense_and_band_triton(*tensors, kinds="s" * HEADS, **options)


def eight_bit_case(tile: eight_bit.EightBitTile, head_dim: int, dtype: torch.dtype) -> None:
    kept = KeysValues(
        torch.empty(HEADS, LENGTH, head_dim, dtype=torch.int8), torch.empty(HEADS, LENGTH // 128),
        torch.empty(HEADS, head_dim, LENGTH, dtype=dtype), torch.empty(HEADS, head_dim), torch.empty(HEADS, head_dim),
        "st" * (HEADS // 2), LAYOUT,
    )  # fmt: skip
    q = qkv(head_dim)[0]
    eight_bit.eight_bit_attention_triton(q, kept, width=700, corrections=corrections(head_dim), tile=tile)
    eight_bit.eight_bit_dense_and_band_triton(q, kept, width=700, tile=tile)


def column_sums_case(tile: band.Tile, head_dim: int, load: band.Load) -> None:
    q, k, _ = qkv(head_dim)
    column_sums.column_sums_triton(q, k, tiles=(tile, tile), load=load)


def factorization_case() -> None:
    dense = half(HEADS, TOKENS, 128)
    before = Factors(half(HEADS, TOKENS, 16), torch.zeros(HEADS, 128, 16))
    factorization.launch_factorize_refresh(dense, dense, 16, before=before, iterations=1)


def cases_of_hopper() -> dict[str, tuple[int, Callable[[], None]]]:
    """What Hopper alone runs: case -> declared KiB of shared memory, and its launches."""
    found: dict[str, tuple[int, Callable[[], None]]] = {}
    for name, config in {"small": linear.SMALL, "medium": linear.MEDIUM, "large": linear.LARGE}.items():
        found[f"int8_linear {name}"] = (config.shared_kib, partial(linear_case, config))
    for dim in (64, 128):
        tile, wide, eight = band.TILES[dim], column_sums.TILES[dim], eight_bit.TILES[dim]
        found[f"band {dim}"] = (tile.shared_kib, partial(band_case, tile, dim, "tma"))
        found[f"column sums {dim}"] = (wide.shared_kib, partial(column_sums_case, wide, dim, "tma"))
        found[f"int8_fp8 {dim}"] = (eight.shared_kib, partial(eight_bit_case, eight, dim, torch.float8_e4m3fn))
    sixteen = eight_bit.SIXTEEN_BIT_TILE
    found["int8_16 128"] = (sixteen.shared_kib, partial(eight_bit_case, sixteen, 128, torch.bfloat16))
    return found


def cases_of_all() -> dict[str, tuple[int, Callable[[], None]]]:
    """What every GPU runs."""
    found: dict[str, tuple[int, Callable[[], None]]] = {"factorization": (factorization.GRAMS_KIB, factorization_case)}
    for dim in (64, 128):
        tile, wide = band.SMALL_TILE, column_sums.SMALL_TILE
        found[f"small band {dim}"] = (tile.shared_kib, partial(band_case, tile, dim, "pointers"))
        found[f"small column sums {dim}"] = (wide.shared_kib, partial(column_sums_case, wide, dim, "pointers"))
    return found


def main() -> None:
    """Compiles what the command line names."""
    taken: list[int] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options |= {key: value for key, value in ON_A_GPU.get(self.fn.__name__, {}).items() if key in options}
        taken.append(run(self, *args, grid=grid, warmup=True, **options).metadata.shared)

    driver.set_active(Target(int(sys.argv[1])))
    JITFunction.run = compile_only
    cases, found = {**cases_of_hopper(), **cases_of_all()}, {}
    for name in sys.argv[2:]:
        cases[name][1]()
        found[name], taken[:] = list(taken), []
    print(json.dumps(found))


if __name__ == "__main__":
    main()
