"""The Triton kernel of band attention, and what surrounds it, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant.ops.band_attention.op import Correction, band_attention, dense_and_band_attention
from reelquant.ops.band_attention.reference import SCALED_TOKENS
from reelquant.tokens import TokenLayout
from tests.errors import raises
from tests.reelquant.ops.test_band_attention import brute_force, qkv

LAYOUTS = [TokenLayout(16, 9, 11, 60), TokenLayout(5, 11, 13, 9), TokenLayout(8, 7, 20, 300), TokenLayout(1, 31, 40, 0)]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


def fused(
    layout: TokenLayout, heads: int, head_dim: int, *, seed: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """q, k and v as the columns of one matrix `[L, 3 H D]`, each seen as `[H, L, D]`."""
    drawn = [x.transpose(0, 1).flatten(1) for x in qkv(layout, heads, head_dim, seed=seed)]
    columns = torch.cat(drawn, dim=1).to(device, dtype).split(heads * head_dim, dim=1)
    return [x.unflatten(1, (heads, head_dim)).transpose(0, 1) for x in columns]


def poisoned(like: Tensor) -> tuple[Tensor, Tensor]:
    """`[L, H D + 24]` full of NaN, and its middle seen as `[H, L, D]`."""
    heads, tokens, head_dim = like.shape
    wide = like.new_full((tokens, heads * head_dim + 24), float("nan"))
    return wide, wide[:, 16:-8].unflatten(1, (heads, head_dim)).transpose(0, 1)


def drawn_corrections(like: Tensor, rank: int, *, num: int) -> list[Correction]:
    """The second with int8 rows and their scales."""
    heads, tokens, head_dim = like.shape
    generator = torch.Generator().manual_seed(5)
    terms: list[Correction] = []
    for scale in (-0.5, 1.75)[:num]:
        rows = torch.randn(tokens, heads, rank, generator=generator).to(like.device, like.dtype).transpose(0, 1)
        directions = torch.randn(heads, head_dim, rank, generator=generator).to(like.device)
        if terms:
            rows, directions = (30 * rows).round().to(torch.int8), directions / 30
            groups = -(-tokens // SCALED_TOKENS)
            factors = torch.rand(heads, groups, rank, generator=generator).to(like.device, torch.bfloat16)
            terms.append(Correction(rows, directions, scale, factors))
        else:
            terms.append(Correction(rows, directions, scale))
    return terms


def plus(attention: Tensor, corrections: list[Correction]) -> Tensor:
    for term in corrections:
        rows = term.rows.double()
        if term.row_scale is not None:
            group = torch.arange(rows.shape[1], device=rows.device) // SCALED_TOKENS
            rows = rows * term.row_scale.double()[:, group]
        attention = attention + term.scale * (rows @ term.directions.double().transpose(1, 2)).cpu()
    return attention


def interpreted_kernel_is_the_definition() -> None:
    from reelquant.ops.band_attention.launch import Load, Tile, band_attention_triton, dense_and_band_triton

    ways: list[tuple[TokenLayout, Load]] = [
        (TokenLayout(4, 5, 7, 11), "tma"),
        (TokenLayout(4, 5, 7, 11), "pointers"),
        (TokenLayout(3, 6, 7, 0), "pointers"),
        (TokenLayout(8, 3, 4, 40), "tma"),
    ]
    for seed, (layout, load) in enumerate(ways):
        options: dict[str, Any] = {"kinds": "st", "layout": layout, "tile": Tile(32, 16, 4, 2), "load": load}
        q, k, v = fused(layout, 2, 16, seed=seed, dtype=torch.float16, device="cpu")
        corrections = drawn_corrections(q, 16, num=2)
        exact = [x.double() for x in (q, k, v)]
        whole = brute_force(*exact, kinds="st", layout=layout, width=layout.num_video)
        for width in ((1, 60), (7, layout.num_video))[seed % 2 ^ (load == "tma")]:
            expected = brute_force(*exact, kinds="st", layout=layout, width=width)
            wide, out = poisoned(q)
            band_attention_triton(q, k, v, width=width, corrections=corrections, out=out, **options)
            assert relative_error(out, plus(expected, corrections)) < 1e-3
            assert bool(wide[:, :16].isnan().all())
            assert bool(wide[:, -8:].isnan().all())
            dense, band = dense_and_band_triton(q, k, v.contiguous(), width=width, **options)
            assert relative_error(band, expected) < 1e-3  # measured: 3e-4, all of them
            assert relative_error(dense, whole) < 1e-3


def test_the_interpreted_kernel_is_the_definition(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernel_is_the_definition")


@pytest.mark.parametrize("width", [3, 50, 100])
def test_corrections_out_and_the_dense_result_without_a_kernel(width: int) -> None:
    layout = TokenLayout(3, 5, 6, 7)
    q, k, v = qkv(layout, 3, 16)
    corrections = drawn_corrections(q, 5, num=2)
    expected = brute_force(q, k, v, kinds="sts", layout=layout, width=width)
    wide, out = poisoned(q)
    options: dict[str, Any] = {"kinds": "sts", "layout": layout, "width": width}
    assert band_attention(q, k, v, corrections=corrections, out=out, **options) is out
    assert relative_error(out, plus(expected, corrections)) < 1e-12
    assert bool(wide[:, :16].isnan().all())
    for implementation in ("auto", "reference"):
        dense, band = dense_and_band_attention(q, k, v, implementation=implementation, **options)
        assert relative_error(band, expected) < 1e-12
        assert relative_error(dense, brute_force(q, k, v, kinds="sts", layout=layout, width=1000)) < 1e-12


def test_corrections_are_differentiable() -> None:
    layout = TokenLayout(2, 2, 3, 2)
    q, k, v = qkv(layout, 2, 4)
    terms = drawn_corrections(q, 3, num=1)
    inputs = [
        q.requires_grad_(),
        terms[0].rows.detach().requires_grad_(),
        terms[0].directions.double().requires_grad_(),
    ]

    def attention(q: Tensor, rows: Tensor, directions: Tensor) -> Tensor:
        correction = Correction(rows, directions, 0.7)
        return band_attention(q, k, v, kinds="st", layout=layout, width=3, corrections=[correction])

    assert torch.autograd.gradcheck(attention, inputs)


def test_what_does_not_fit_is_refused() -> None:
    layout = TokenLayout(2, 3, 4, 2)
    q, k, v = qkv(layout, 2, 8)
    options: dict[str, Any] = {"kinds": "st", "layout": layout, "width": 3}
    with raises(ValueError, "triton", "cpu"):
        band_attention(q, k, v, implementation="triton", **options)
    with raises(ValueError, "triton", "cpu"):
        dense_and_band_attention(q, k, v, implementation="triton", **options)
    with raises(ValueError, "out", torch.float64, torch.float32):
        band_attention(q, k, v, out=torch.empty(2, 26, 8), **options)
    with raises(ValueError, "out", "gradient"):
        band_attention(q.clone().requires_grad_(), k, v, out=torch.empty_like(q), **options)
    codes, directions = torch.ones(2, 26, 4, dtype=torch.int8), torch.ones(2, 8, 4)
    for factors in (torch.ones(2, 1, 4), torch.ones(2, 26, 4).bfloat16(), torch.ones(2, 1, 8).bfloat16()[..., ::2]):
        with raises(ValueError, "row_scale", factors.dtype, list(factors.shape)):
            band_attention(q, k, v, corrections=[Correction(codes, directions, row_scale=factors)], **options)
    bad = Correction(torch.ones(2, 26, 4), torch.ones(2, 8, 5))
    with raises(ValueError, "rows", "directions", (2, 26, 4), (2, 8, 5)):
        band_attention(q, k, v, corrections=[bad], **options)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_is_the_definition(layout: TokenLayout, head_dim: int) -> None:
    for seed, width in enumerate((1, 77, 600, layout.num_video)):
        q, k, v = fused(layout, 3, head_dim, seed=seed, dtype=torch.bfloat16, device="cuda")
        expected = brute_force(*(x.double().cpu() for x in (q, k, v)), kinds="sts", layout=layout, width=width)
        wide, out = poisoned(q)
        options: dict[str, Any] = {"kinds": "sts", "layout": layout, "width": width, "implementation": "triton"}
        assert band_attention(q, k, v, out=out, **options) is out
        assert relative_error(out, expected) < TOLERANCE[q.dtype], width
        assert bool(wide[:, :16].isnan().all())
        assert bool(wide[:, -8:].isnan().all())
        again = band_attention(q, k, v, **options)
        assert torch.equal(again, out)
        assert again.transpose(0, 1).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_the_kernel_takes_corrections_and_any_strides(layout: TokenLayout, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = fused(layout, 3, head_dim, seed=7, dtype=dtype, device="cuda")
    k, v = (
        k.contiguous(),
        torch.nn.functional.pad(v, (0, 4))[..., :head_dim],
    )  # v's rows start at no multiple of 16 bytes
    exact = [x.double().cpu() for x in (q, k, v)]
    for num, rank in ((1, 16), (2, 32)):
        corrections = drawn_corrections(q, rank, num=num)
        expected = plus(brute_force(*exact, kinds="tst", layout=layout, width=150), corrections)
        options: dict[str, Any] = {"kinds": "tst", "layout": layout, "width": 150, "corrections": corrections}
        out = band_attention(q, k, v, implementation="triton", **options)
        assert relative_error(out, expected) < TOLERANCE[dtype]
        assert torch.equal(band_attention(q, k, v, **options), out)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_gives_both_in_one_pass(layout: TokenLayout, head_dim: int) -> None:
    for seed, width in enumerate((1, 77, 600)):
        q, k, v = fused(layout, 3, head_dim, seed=seed, dtype=torch.bfloat16, device="cuda")
        exact = [x.double().cpu() for x in (q, k, v)]
        options: dict[str, Any] = {"kinds": "sts", "layout": layout, "width": width, "implementation": "triton"}
        dense, band = dense_and_band_attention(q, k, v, **options)
        assert relative_error(band, brute_force(*exact, kinds="sts", layout=layout, width=width)) < 1e-2
        assert relative_error(dense, brute_force(*exact, kinds="sts", layout=layout, width=10_000)) < 1e-2
        assert torch.equal(band, band_attention(q, k, v, **options))


@pytest.mark.gpu
def test_what_the_kernel_does_not_take() -> None:
    layout = TokenLayout(4, 5, 6, 3)
    options: dict[str, Any] = {"kinds": "st", "layout": layout, "width": 9, "implementation": "triton"}
    q, k, v = fused(layout, 2, 64, seed=0, dtype=torch.bfloat16, device="cuda")
    with raises(ValueError, "q", "k", "v", torch.float32):
        band_attention(q, k, v.float(), **options)
    with raises(ValueError, "head size", 32, 64, 128):
        band_attention(*(x[..., :32] for x in (q, k, v)), **options)
    with raises(ValueError, "triton", "gradient"):
        band_attention(q.detach().requires_grad_(), k, v, **options)
    with raises(ValueError, "contiguous"):
        band_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, **options)
    with raises(ValueError, torch.bfloat16, "rank 5", 16):
        band_attention(q, k, v, corrections=drawn_corrections(q, 5, num=1), **options)
    with raises(ValueError, 3, 2, "corrections"):
        band_attention(q, k, v, corrections=drawn_corrections(q, 16, num=1) * 3, **options)
