"""Normalization and rotary embedding of q and k against diffusers' own modules, and the kernel against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from reelquant.ops.qk_norm_rope.op import qk_norm_rope
from reelquant.ops.qk_norm_rope.reference import turned
from tests.errors import raises

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


class Case(NamedTuple):
    num_tokens: int
    num_video: int
    num_heads: int
    head_dim: int
    own_text_weights: bool = False


CASES = [Case(37, 29, 3, 32, True), Case(20, 20, 2, 128), Case(19, 0, 2, 64), Case(50, 33, 1, 16)]
GPU_CASES = [
    Case(4131, 4071, 24, 128, True),
    Case(4131, 4071, 24, 128),
    Case(1, 1, 24, 128),
    Case(60, 0, 24, 128),
    Case(1025, 1025, 48, 64, True),
    Case(333, 300, 2, 256, True),
    Case(57_857, 57_600, 2, 128, True),
]


def drawn(case: Case, *, dtype: torch.dtype, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """A q|k|v buffer that is part of a wider one, with loud channels, and everything else."""
    generator = torch.Generator().manual_seed(seed)
    length, n, heads, d, own = case
    wide = 2 * torch.randn(length, 3 * heads * d + 32, generator=generator)
    wide[:, ::41] *= 15
    weights = [(1 + 0.3 * torch.randn(d, generator=generator)).bfloat16() for _ in range(4)]
    angles = (100 * torch.rand(n, d // 2, generator=generator)).repeat_interleave(2, dim=1)
    others: dict[str, Any] = {
        "num_heads": heads,
        "norm_weights": tuple(weights[:2]),
        "text_norm_weights": tuple(weights[2:]) if own else tuple(weights[:2]),
        "rotary": (angles.cos(), angles.sin()),
        "eps": 1e-6,
    }
    return wide.to(dtype), others


def on(device: str, others: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(x.to(device) for x in value) if isinstance(value, tuple) else value
        for name, value in others.items()
    }


def in_float64(qkv: Tensor, others: dict[str, Any]) -> Tensor:
    expected = qkv.double()
    d = len(others["norm_weights"][0])
    cos, sin = (table.double()[:, None] for table in others["rotary"])
    n, width = len(cos), others["num_heads"] * d
    for side in range(2):
        x = expected[:, side * width : (side + 1) * width].unflatten(1, (-1, d))
        x = x / (x.square().mean(-1, keepdim=True) + others["eps"]).sqrt()
        video = x[:n] * others["norm_weights"][side].double()
        video = video * cos + turned(video) * sin
        text = x[n:] * others["text_norm_weights"][side].double()
        expected[:, side * width : (side + 1) * width] = torch.cat([video, text]).flatten(1)
    return expected


def check(case: Case, run: Callable[..., Tensor], *, dtype: torch.dtype, seed: int, device: str = "cpu") -> None:
    wide, others = drawn(case, dtype=dtype, seed=seed)
    wide, others = wide.to(device), on(device, others)
    before, used = wide.clone(), 2 * case.num_heads * case.head_dim
    buffer = wide[:, : 3 * case.num_heads * case.head_dim]
    assert run(buffer, **others).data_ptr() == wide.data_ptr()
    expected = in_float64(before, others)[:, :used]
    error = float((wide[:, :used].double() - expected).norm() / expected.norm())
    assert error < TOLERANCE[dtype], error
    assert torch.equal(wide[:, used:], before[:, used:])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference_is_the_formula(case: Case, dtype: torch.dtype) -> None:
    check(case, qk_norm_rope, dtype=dtype, seed=1)  # measured: 6e-8, 2.1e-4 and 1.7e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_what_diffusers_computes(case: Case, dtype: torch.dtype) -> None:
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    wide, others = drawn(case, dtype=dtype, seed=2)
    _, n, heads, d, _ = case
    expected = []
    for side in range(2):
        x = wide[:, side * heads * d : (side + 1) * heads * d].unflatten(1, (heads, d))[None]
        parts = []
        for part, weights in ((x[:, :n], others["norm_weights"]), (x[:, n:], others["text_norm_weights"])):
            norm = RMSNorm(d, eps=others["eps"])
            norm.weight.data = weights[side].to(dtype)
            parts.append(norm(part).detach())
        if n:
            parts[0] = apply_rotary_emb(parts[0], others["rotary"], sequence_dim=1)
        expected.append(torch.cat(parts, dim=1)[0].flatten(1))
    qk_norm_rope(wide, **others)
    error = float((wide[:, : 2 * heads * d] - torch.cat(expected, dim=1)).norm() / torch.cat(expected).norm())
    # diffusers rounds to bf16 three times on the way
    assert error < (1e-6 if dtype == torch.float32 else 6e-3), error  # measured: 1e-7 and 3e-3


def test_errors() -> None:
    wide, others = drawn(CASES[0], dtype=torch.float32, seed=0)
    cos, sin = others["rotary"]
    with raises(ValueError, "qkv", 9, 32, 576, 320):
        qk_norm_rope(wide, **{**others, "num_heads": 9})
    with raises(ValueError, "rotary", [29, 31], 37):
        qk_norm_rope(wide, **{**others, "rotary": (cos[:, 1:].contiguous(), sin)})
    with raises(ValueError, "rotary", "float32", torch.bfloat16):
        qk_norm_rope(wide, **{**others, "rotary": (cos.bfloat16(), sin)})
    with raises(ValueError, "norm weights", [32], [31]):
        qk_norm_rope(wide, **{**others, "text_norm_weights": (torch.ones(31), torch.ones(32))})
    with raises(ValueError, "qkv", [320, 37], (1, 320)):
        qk_norm_rope(wide.T, **others)
    with raises(ValueError, "triton", "cpu"):
        qk_norm_rope(wide, **others, implementation="triton")


def test_the_kernel_interpreted(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernel")


def interpreted_kernel() -> None:
    from reelquant.ops.qk_norm_rope.kernel import launch_qk_norm_rope

    for seed, case in enumerate(CASES):
        # The interpreter cuts bits off where the hardware rounds to bf16.
        for dtype in (torch.float32, torch.float16):
            check(case, launch_qk_norm_rope, dtype=dtype, seed=seed)
            check(case, partial(launch_qk_norm_rope, tokens=8, num_stages=2), dtype=dtype, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernel(case: Case, dtype: torch.dtype) -> None:
    for seed in range(2):
        check(case, partial(qk_norm_rope, implementation="triton"), dtype=dtype, seed=seed, device="cuda")


@pytest.mark.gpu
def test_the_kernel_on_what_it_does_not_take() -> None:
    case = Case(20, 12, 3, 12)
    with raises(ValueError, 12, 16, 256):
        check(case, partial(qk_norm_rope, implementation="triton"), dtype=torch.float32, seed=0, device="cuda")
    check(case, qk_norm_rope, dtype=torch.float32, seed=0, device="cuda")
