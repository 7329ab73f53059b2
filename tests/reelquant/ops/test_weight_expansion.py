"""Expansion of stored weights: bit-exact, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reelquant.ops.weight_expansion.op import expand_weight
from reelquant.quantization.packing import pack_bits
from reelquant.quantization.weight_grid import WeightGrid, fit_per_channel, fit_two_level
from tests.errors import raises

KERNEL_BITS = (4, 6, 8)


def stored(n: int, d: int, bits: int, *, seed: int = 0, two_level: bool = True) -> tuple[Tensor, WeightGrid, Tensor]:
    """Packed codes, their grid and what they expand to, from a Gaussian weight."""
    weight = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    weight[:, ::17] *= 6
    grid = fit_two_level(weight, bits) if two_level else fit_per_channel(weight, bits)
    codes = grid.round(weight)
    return pack_bits(codes, bits), grid, grid.expand(codes)


def check(run: Callable[..., Tensor], shapes: list[tuple[int, int]], *, all_bits: tuple[int, ...], device: str) -> None:
    for bits in all_bits:
        for seed, (n, d) in enumerate(shapes):
            for two_level in (False, True):
                packed, grid, expected = stored(n, d, bits, seed=seed, two_level=two_level)
                scale = None if grid.group_scale is None else grid.group_scale.to(device)
                out = torch.full((n, d), 99, dtype=torch.int8, device=device)
                result = run(packed.to(device), bits=bits, group_scale=scale, out=out)
                assert result.data_ptr() == out.data_ptr()
                assert torch.equal(out.cpu(), expected), (bits, n, d, two_level)
            # Any bytes and any scales, also those that no grid has: both wrap around alike.
            generator = torch.Generator().manual_seed(seed)
            packed = torch.randint(0, 256, packed.shape, generator=generator, dtype=torch.uint8)
            scale = torch.randint(0, 256, (n, -(-d // 64)), generator=generator, dtype=torch.uint8)
            expected = expand_weight(packed, bits=bits, num_inputs=d, group_scale=scale)
            out = torch.full((n, d), 99, dtype=torch.int8, device=device)
            run(packed.to(device), bits=bits, group_scale=scale.to(device), out=out)
            assert torch.equal(out.cpu(), expected), (bits, n, d)


def test_is_what_the_grid_expands_to() -> None:
    def run(packed: Tensor, *, bits: int, group_scale: Tensor | None, out: Tensor) -> Tensor:
        return expand_weight(packed, bits=bits, num_inputs=out.shape[1], group_scale=group_scale, out=out)

    check(run, [(1, 8), (5, 63), (1030, 65), (3, 200)], all_bits=tuple(range(2, 9)), device="cpu")
    packed, grid, expected = stored(7, 100, 4)
    assert torch.equal(expand_weight(packed, bits=4, num_inputs=100, group_scale=grid.group_scale), expected)


def test_errors() -> None:
    packed, grid, _ = stored(3, 128, 4)
    with raises(ValueError, 128, "6 bits", 96, [3, 64]):
        expand_weight(packed, bits=6, num_inputs=128, group_scale=None)
    with raises(ValueError, "group_scale", [3, 2], [3, 1]):
        expand_weight(packed, bits=4, num_inputs=128, group_scale=torch.ones(3, 1, dtype=torch.uint8))
    with raises(ValueError, "out", "contiguous", [3, 128]):
        expand_weight(packed, bits=4, num_inputs=128, group_scale=None, out=torch.empty(128, 3, dtype=torch.int8).T)
    with raises(ValueError, "bits", 9):
        expand_weight(packed, bits=9, num_inputs=128, group_scale=None)
    with raises(ValueError, "triton", "cpu"):
        expand_weight(packed, bits=4, num_inputs=128, group_scale=grid.group_scale, implementation="triton")


def test_the_kernel_interpreted(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernel")


def interpreted_kernel() -> None:
    from reelquant.ops.weight_expansion.kernel import launch_expand_weight

    check(launch_expand_weight, [(1, 16), (5, 80), (3, 192), (2, 3072)], all_bits=KERNEL_BITS, device="cpu")


@pytest.mark.gpu
def test_the_kernel() -> None:
    def run(packed: Tensor, *, bits: int, group_scale: Tensor | None, out: Tensor) -> Tensor:
        return expand_weight(
            packed, bits=bits, num_inputs=out.shape[1], group_scale=group_scale, out=out, implementation="triton"
        )

    shapes = [(1, 16), (3, 80), (1031, 3072), (77, 12_288), (509, 15_360), (3072, 3072)]
    check(run, shapes, all_bits=KERNEL_BITS, device="cuda")


@pytest.mark.gpu
def test_the_kernel_on_what_it_does_not_take() -> None:
    packed, grid, expected = stored(9, 72, 3)
    assert grid.group_scale is not None
    on_device = {"num_inputs": 72, "group_scale": grid.group_scale.cuda()}
    assert torch.equal(expand_weight(packed.cuda(), bits=3, **on_device).cpu(), expected)  # type: ignore[arg-type]
    with raises(ValueError, "bits", 3):
        expand_weight(packed.cuda(), bits=3, **on_device, implementation="triton")  # type: ignore[arg-type]
