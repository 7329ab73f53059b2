"""Attention in 8 bits: the reference against exact attention in float64, the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant.ops.band_attention.op import band_attention, dense_and_band_attention, dense_attention
from reelquant.ops.eight_bit_attention.op import (
    Precision,
    eight_bit_attention,
    eight_bit_dense_and_band,
    quantize_keys_values,
)
from reelquant.tokens import TokenLayout
from tests.errors import raises
from tests.reelquant.ops.test_band_attention import brute_force
from tests.reelquant.ops.test_band_attention_kernel import drawn_corrections, plus, poisoned, relative_error

LAYOUTS = [TokenLayout(16, 9, 11, 60), TokenLayout(5, 11, 13, 9), TokenLayout(8, 7, 20, 300), TokenLayout(1, 31, 40, 0)]
EXACT: dict[Precision, float] = {"int8_fp8": 6e-2, "int8_16": 1.2e-2}
"""Largest error against float64; measured in the reference: 2.7e-2 to 5.2e-2, and up to 1.02e-2."""

LOOSE: dict[Precision, float] = {"int8_fp8": 3e-2, "int8_16": 1e-3}
"""Largest error of a kernel against the reference; measured: 2.6e-2, and 3.4e-4."""


def normed(
    layout: TokenLayout,
    heads: int,
    head_dim: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k and v as the columns of one matrix: root mean square 1, loud channels; of q and k by a mean, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(layout.num_tokens, 3, heads, head_dim, generator=generator)
    gain = torch.ones(head_dim)
    gain[:: head_dim // 4] = 8
    wide[:, :2] += gain * torch.randn(2, heads, head_dim, generator=generator)
    wide[:, 2] *= gain
    wide = wide * wide.square().mean(3, keepdim=True).rsqrt()
    return list(wide.to(device, dtype).permute(1, 2, 0, 3))


def exactly(q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int) -> Tensor:
    return brute_force(*(x.double().cpu() for x in (q, k, v)), kinds=kinds, layout=layout, width=width)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["int8_fp8", "int8_16"])
def test_the_reference_is_near_exact_attention(layout: TokenLayout, precision: Precision) -> None:
    for seed, (head_dim, width) in enumerate([(64, 1), (128, 77), (64, 600), (128, layout.num_video)]):
        q, k, v = normed(layout, 3, head_dim, seed=seed)
        options: dict[str, Any] = {"kinds": "sts", "layout": layout, "width": width}
        out = band_attention(q, k, v, precision=precision, **options)
        assert out.dtype == q.dtype
        assert relative_error(out, exactly(q, k, v, **options)) < EXACT[precision], (head_dim, width)


@pytest.mark.parametrize("scores", [1, 900, 2**17])
def test_tiles_of_the_reference_are_the_whole(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """A query of one head at a time, three of them, all of one head or of two."""
    layout = TokenLayout(3, 5, 9, 13)
    q, k, v = normed(layout, 3, 64, seed=5, dtype=torch.float32)
    options: dict[str, Any] = {"kinds": "sts", "layout": layout, "width": 40, "precision": "int8_fp8"}
    whole = band_attention(q, k, v, **options)
    monkeypatch.setattr("reelquant.ops.eight_bit_attention.reference.TILE_SCORES", scores)
    assert relative_error(band_attention(q, k, v, **options), whole) < 1e-6


def test_one_quantization_serves_band_and_dense() -> None:
    layout = TokenLayout(4, 7, 9, 13)
    q, k, v = normed(layout, 2, 64, seed=1)
    kept = quantize_keys_values(k, v, kinds="ts", layout=layout)
    assert kept.key_codes.dtype == torch.int8
    assert kept.value_codes.dtype == torch.float8_e4m3fn
    dense, band = eight_bit_dense_and_band(q, kept, width=40)
    assert torch.equal(band, eight_bit_attention(q, kept, width=40))
    assert torch.equal(dense, eight_bit_attention(q, kept))
    options: dict[str, Any] = {"kinds": "ts", "layout": layout, "width": 40, "precision": "int8_fp8"}
    assert torch.equal(band, band_attention(q, k, v, **options))
    for found, expected in zip(dense_and_band_attention(q, k, v, **options), (dense, band), strict=True):
        assert torch.equal(found, expected)
    whole = exactly(q, k, v, kinds="ts", layout=layout, width=1000)
    for precision in ("int8_fp8", "int8_16"):
        assert relative_error(dense_attention(q, k, v, precision=precision), whole) < EXACT[precision]


def test_constant_keys_and_values_cost_nothing() -> None:
    """A mean of all keys does not count, one of all values comes back: both are exact but for rounding to 16 bits."""
    layout = TokenLayout(3, 5, 7, 4)
    q, k, v = normed(layout, 2, 64, seed=2)
    options: dict[str, Any] = {"kinds": "st", "layout": layout, "width": 30, "precision": "int8_fp8"}
    plain = band_attention(q, k, v, **options)
    moved = band_attention(q.float(), k.float() + 100, v.float() + 1000, **options)
    assert relative_error(moved.double() - 1000, plain.double()) < 2e-2  # measured: 8e-3, codes at a tie
    same = band_attention(q, torch.ones_like(k), torch.full_like(v, 3.0), **options)
    assert torch.equal(same, torch.full_like(v, 3.0))


def test_nothing_out_of_zeros_is_not_a_number() -> None:
    layout = TokenLayout(2, 5, 3, 3)
    zeros = torch.zeros(2, layout.num_tokens, 64)
    for precision in ("int8_fp8", "int8_16"):
        out = band_attention(zeros, zeros, zeros, kinds="st", layout=layout, width=4, precision=precision)
        assert torch.equal(out, zeros)


BROKEN = [("q", 5), ("q", 26), ("k", 3), ("k", 8), ("k", 25), ("v", 8), ("v", 27)]
"""A tensor and a token; keys at multiples of 8 count for the shift of the keys, the others do not."""
SMALL = TokenLayout(2, 4, 3, 5)


def check_not_a_number(attention: Callable[..., Tensor], precision: Precision, broken: tuple[str, int]) -> None:
    """One NaN in head 1: its rows are NaN, and nothing becomes so in head 0."""
    name, token = broken
    tensors = dict(zip("qkv", normed(SMALL, 2, 32, seed=3), strict=True))
    tensors[name] = tensors[name].clone()
    tensors[name][1, token, 7] = torch.nan
    out = attention(*tensors.values(), kinds="st", layout=SMALL, width=1000, precision=precision)
    assert bool(out[0].isfinite().all()), broken
    concerned = out[1, token] if name == "q" else out[1] if name == "k" else out[1, :, 7]
    assert bool(concerned.isnan().all()), broken
    if name == "q":
        assert int(out.isnan().sum()) == 32


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("precision", ["int8_fp8", "int8_16"])
def test_what_is_not_a_number_comes_out_so(precision: Precision, broken: tuple[str, int]) -> None:
    check_not_a_number(band_attention, precision, broken)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8_fp8", "int8_16"])
def test_what_is_not_a_number_comes_out_so_of_the_kernels(precision: Precision) -> None:
    layout = TokenLayout(4, 9, 20, 150)
    for name, token in [("q", 5), ("q", 860), ("k", 3), ("k", 8), ("k", 800), ("v", 8)]:
        tensors = dict(zip("qkv", normed(layout, 2, 64, seed=3, dtype=torch.bfloat16, device="cuda"), strict=True))
        tensors[name] = tensors[name].clone()
        tensors[name][1, token, 7] = torch.nan
        out = band_attention(*tensors.values(), kinds="st", layout=layout, width=10_000, precision=precision)
        concerned = out[1, token] if name == "q" else out[1] if name == "k" else out[1, :, 7]
        assert bool(concerned.isnan().all()), (name, token)
        assert bool(out[0].isfinite().all()), (name, token)


@pytest.mark.parametrize("loudness", [20.0, 100.0])
def test_one_loud_key_costs_the_scores_of_its_neighbours(loudness: float) -> None:
    """Measured: 0.041 and 0.034 at 20, 0.048 and 0.043 at 100; the table of `op.py` says it."""
    layout = TokenLayout(4, 9, 10, 20)
    q, k, v = normed(layout, 2, 64, seed=4)
    k = k.clone()
    k[:, 111] *= loudness
    options: dict[str, Any] = {"kinds": "st", "layout": layout, "width": 10_000}
    exact = exactly(q, k, v, **options)
    precisions: tuple[Precision, Precision] = ("int8_fp8", "int8_16")
    for precision in precisions:
        found = band_attention(q, k, v, precision=precision, **options)
        assert relative_error(found, exact) < 0.06


def test_what_does_not_fit_is_refused() -> None:
    layout = TokenLayout(2, 3, 4, 2)
    q, k, v = normed(layout, 2, 64, seed=0)
    options: dict[str, Any] = {"kinds": "st", "layout": layout, "width": 3}
    with raises(ValueError, "triton", "cpu"):
        band_attention(q, k, v, implementation="triton", precision="int8_fp8", **options)
    with raises(ValueError, "flex", "cpu"):
        band_attention(q, k, v, implementation="flex", precision="int8_fp8", **options)
    with raises(ValueError, "precision", "int4", "int8_fp8", "int8_16"):
        band_attention(q, k, v, precision="int4", **options)  # type: ignore[arg-type]
    with raises(ValueError, "gradient", "precision"):
        band_attention(q.clone().requires_grad_(), k, v, precision="int8_fp8", **options)
    kept = quantize_keys_values(k, v, kinds="st", layout=layout)
    with raises(ValueError, "q", (2, 26, 64), (2, 25, 64)):
        eight_bit_attention(q[:, 1:], kept)
    with raises(ValueError, "width", 0):
        eight_bit_attention(q, kept, width=0)
    with raises(ValueError, "kinds", 2, "sx"):
        quantize_keys_values(k, v, kinds="sx", layout=layout)


def interpreted_kernels_are_the_reference() -> None:
    from reelquant.ops.eight_bit_attention.launch import (
        EightBitTile,
        eight_bit_attention_triton,
        eight_bit_dense_and_band_triton,
        quantize_keys_values_triton,
    )

    cases: list[tuple[TokenLayout, Precision, EightBitTile, int]] = [
        (TokenLayout(4, 5, 7, 11), "int8_16", EightBitTile(32, 16, 4, 2), 7),
        (TokenLayout(3, 6, 17, 140), "int8_16", EightBitTile(64, 128, 4, 2), 60),
        (TokenLayout(1, 5, 7, 0), "int8_16", EightBitTile(32, 64, 4, 2), 1),
        (TokenLayout(8, 3, 6, 40), "int8_fp8", EightBitTile(64, 64, 4, 2), 1000),
        (TokenLayout(5, 5, 7, 130), "int8_fp8", EightBitTile(32, 32, 4, 2, promote=False), 50),
    ]
    for seed, (layout, precision, tile, width) in enumerate(cases):
        q, k, v = normed(layout, 2, (16, 32)[seed % 2], seed=seed)
        options: dict[str, Any] = {"kinds": "st", "layout": layout, "precision": precision}
        kept = quantize_keys_values(k, v, **options)
        found = quantize_keys_values_triton(k, v, **options)
        assert int((found.key_codes.int() - kept.key_codes.int()).abs().max()) <= 1
        assert float((found.key_codes != kept.key_codes).float().mean()) < 1e-3
        assert float((found.value_codes.float() != kept.value_codes.float()).float().mean()) < 1e-3
        for name in ("key_scale", "value_scale", "value_shift"):
            torch.testing.assert_close(getattr(found, name), getattr(kept, name))
        corrections = drawn_corrections(q, 16, num=2)
        # Weights are rounded beside the largest so far: their three bits of mantissa fall otherwise where that rises. Without
        # queries all are the largest, and every key and value must count exactly once.
        for queries, tight in ((q, LOOSE[precision]), (torch.zeros_like(q), 1e-3)):
            expected = eight_bit_attention(queries, kept, width=width).double()
            wide, out = poisoned(q)
            eight_bit_attention_triton(queries, kept, width=width, corrections=corrections, out=out, tile=tile)
            assert relative_error(out, plus(expected, corrections)) < tight
            assert bool(wide[:, :16].isnan().all())
            assert bool(wide[:, -8:].isnan().all())
            dense, band = eight_bit_dense_and_band_triton(queries, kept, width=width, tile=tile)
            assert relative_error(band, expected) < tight
            assert relative_error(dense, eight_bit_attention(queries, kept).double()) < tight


def interpreted_kernels_keep_what_is_not_a_number() -> None:
    from reelquant.ops.eight_bit_attention.launch import (
        EightBitTile,
        eight_bit_attention_triton,
        quantize_keys_values_triton,
    )

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int, precision: Precision
    ) -> Tensor:
        kept = quantize_keys_values_triton(k, v, kinds=kinds, layout=layout, precision=precision)
        return eight_bit_attention_triton(q, kept, width=width, tile=EightBitTile(32, 64, 4, 2))

    for broken in BROKEN:
        check_not_a_number(attention, "int8_fp8", broken)
    check_not_a_number(attention, "int8_16", BROKEN[2])


def test_the_interpreted_kernels_keep_what_is_not_a_number(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernels_keep_what_is_not_a_number")


def test_the_interpreted_kernels_are_the_reference(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernels_are_the_reference")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [*LAYOUTS, TokenLayout(16, 15, 20, 77)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("precision", ["int8_fp8", "int8_16"])
def test_the_kernels_are_the_reference(layout: TokenLayout, head_dim: int, precision: Precision) -> None:
    for seed, width in enumerate((1, 77, 600, layout.num_video)):
        q, k, v = normed(layout, 3, head_dim, seed=seed, dtype=torch.bfloat16, device="cuda")
        options: dict[str, Any] = {"kinds": "sts", "layout": layout, "precision": precision}
        kept = quantize_keys_values(k, v, implementation="reference", **options)
        found = quantize_keys_values(k, v, **options)
        assert int((found.key_codes.int() - kept.key_codes.int()).abs().max()) <= 1
        assert float((found.key_codes != kept.key_codes).float().mean()) < 1e-3
        assert float((found.value_codes.float() != kept.value_codes.float()).float().mean()) < 1e-3
        torch.testing.assert_close(found.value_scale, kept.value_scale)
        corrections = drawn_corrections(q, 16, num=2)
        whole_width = layout.num_video
        exact, exact_whole = (exactly(q, k, v, kinds="sts", layout=layout, width=each) for each in (width, whole_width))
        reference, reference_whole = (
            eight_bit_attention(q, kept, width=each, implementation="reference").double().cpu()
            for each in (width, whole_width)
        )
        # Weights rounded beside another largest are as wrong as the reference's, in other places: the two lie as far apart
        # as each lies from exact, at most sqrt(2) times. How far that is depends on how large sums of signed values are.
        own = max(relative_error(reference, exact), relative_error(reference_whole, exact_whole))
        assert own < EXACT[precision], width
        # Without queries all weights are the largest, and every key and value must count exactly once; bf16 is 2e-3 off.
        for queries, tight in ((q, max(1.2 * own, 1e-2)), (torch.zeros_like(q), 5e-3)):
            expected = eight_bit_attention(queries, kept, width=width, implementation="reference").double().cpu()
            whole = eight_bit_attention(queries, kept, implementation="reference").double().cpu()
            wide, out = poisoned(q)
            assert eight_bit_attention(queries, kept, width=width, corrections=corrections, out=out) is out
            assert relative_error(out, plus(expected, corrections)) < tight, width
            assert bool(wide[:, :16].isnan().all())
            assert bool(wide[:, -8:].isnan().all())
            dense, band = eight_bit_dense_and_band(queries, kept, width=width)
            assert relative_error(band, expected) < tight, width
            assert relative_error(dense, whole) < tight, width
            assert torch.equal(band, eight_bit_attention(queries, kept, width=width))
        error = relative_error(band_attention(q, k, v, width=width, **options), exact)
        assert error < 1.1 * relative_error(reference, exact) + 2e-3, width


@pytest.mark.gpu
def test_every_tile_gives_the_same() -> None:
    from reelquant.ops.eight_bit_attention.launch import TILES, EightBitTile, eight_bit_attention_triton

    layout = TokenLayout(16, 15, 20, 77)
    others = [EightBitTile(128, 64, 8, 3), EightBitTile(64, 64, 4, 3, registers=168)]
    others.append(EightBitTile(64, 64, 4, 3, promote=False))
    for head_dim, default in TILES.items():
        q, k, v = normed(layout, 2, head_dim, seed=head_dim, dtype=torch.bfloat16, device="cuda")
        kept = quantize_keys_values(k, v, kinds="st", layout=layout)
        expected = eight_bit_attention(q, kept, width=700, implementation="reference").double().cpu()
        for tile in (default, *others):
            out = eight_bit_attention_triton(q, kept, width=700, tile=tile)
            assert relative_error(out, expected) < EXACT["int8_fp8"], tile
            assert torch.equal(out, eight_bit_attention_triton(q, kept, width=700, tile=tile)), tile
