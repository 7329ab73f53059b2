from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from reelquant.calibration.attention_distillation import (
    attention_targets,
    global_attention_loss,
    global_loss,
    local_attention_loss,
    local_loss,
    pool_tokens,
    salient_tokens,
)
from tests.errors import raises

SHAPES = [(1, 1, 1), (3, 61, 16), (2, 130, 7)]


def drawn(
    shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Full precision's q and k, and quantized ones beside them, which take gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    near_q, near_k = (x + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for x in (q, k))
    return q.to(dtype), k.to(dtype), near_q.to(dtype).requires_grad_(), near_k.to(dtype).requires_grad_()


def maps(q: Tensor, k: Tensor) -> Tensor:
    result: Tensor = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return result


def pooled(x: Tensor, stride: int) -> Tensor:
    return torch.stack([run.mean(dim=1) for run in x.split(stride, dim=1)], dim=1)


def brute_global(q_fp: Tensor, k_fp: Tensor, q_q: Tensor, k_q: Tensor, stride: int) -> Tensor:
    q_fp, k_fp, q_q, k_q = (pooled(x, stride) for x in (q_fp, k_fp, q_q, k_q))
    return mse_loss(maps(q_q, k_q), maps(q_fp, k_fp))


def brute_local(q_fp: Tensor, k_fp: Tensor, q_q: Tensor, k_q: Tensor, indices: Tensor) -> Tensor:
    return mse_loss(maps(q_q[:, indices], k_q), maps(q_fp[:, indices], k_fp))


def with_gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(3 * loss, tensors)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        error = float((mine.double() - theirs).norm() / theirs.norm().clamp_min(1e-12))
        assert error < tolerance, error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 4, 128])
@pytest.mark.parametrize("tile_bytes", [1, 5_000, 64 * 2**20])
def test_global_against_whole_maps(shape: tuple[int, int, int], stride: int, tile_bytes: int) -> None:
    q_fp, k_fp, q_q, k_q = drawn(shape)
    expected = with_gradients(brute_global(q_fp, k_fp, q_q, k_q, stride), q_q, k_q)
    targets = attention_targets(q_fp, k_fp, stride=stride)
    assert_near(with_gradients(global_loss(targets, q_q, k_q, tile_bytes=tile_bytes), q_q, k_q), expected, 1e-12)
    assert_near(with_gradients(global_attention_loss(q_fp, k_fp, q_q, k_q, stride), q_q, k_q), expected, 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num", [1, 5, 1000])
@pytest.mark.parametrize("tile_bytes", [1, 5_000, 64 * 2**20])
def test_local_against_whole_maps(shape: tuple[int, int, int], num: int, tile_bytes: int) -> None:
    q_fp, k_fp, q_q, k_q = drawn(shape)
    indices = torch.randperm(shape[1])[:num]
    expected = with_gradients(brute_local(q_fp, k_fp, q_q, k_q, indices), q_q, k_q)
    targets = attention_targets(q_fp, k_fp, indices=indices)
    assert_near(with_gradients(local_loss(targets, q_q, k_q, tile_bytes=tile_bytes), q_q, k_q), expected, 1e-12)
    assert_near(with_gradients(local_attention_loss(q_fp, k_fp, q_q, k_q, indices), q_q, k_q), expected, 1e-12)


def test_gradcheck() -> None:
    q_fp, k_fp, q_q, k_q = drawn((2, 9, 3))
    indices = torch.tensor([0, 4, 8])
    targets = attention_targets(q_fp, k_fp, stride=4, indices=indices)
    for tile_bytes in (1, 2**20):
        assert torch.autograd.gradcheck(lambda q, k: global_loss(targets, q, k, tile_bytes=tile_bytes), (q_q, k_q))  # noqa: B023
        assert torch.autograd.gradcheck(lambda q, k: local_loss(targets, q, k, tile_bytes=tile_bytes), (q_q, k_q))  # noqa: B023
    assert torch.autograd.gradcheck(lambda x: pool_tokens(x, 4), (q_q,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_narrow_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Measured: 1.1e-6 in float32; in bfloat16 2e-7 for the losses and 2.7e-3, its rounding, for the gradients."""
    q_fp, k_fp, q_q, k_q = drawn((3, 61, 16), dtype=dtype)
    fixed_q, fixed_k, wide_q, wide_k = (x.detach().double() for x in (q_fp, k_fp, q_q, k_q))
    wide_q.requires_grad_()
    wide_k.requires_grad_()
    indices = torch.tensor([3, 4, 60])
    for found, expected in (
        (global_attention_loss(q_fp, k_fp, q_q, k_q, 8), brute_global(fixed_q, fixed_k, wide_q, wide_k, 8)),
        (
            local_attention_loss(q_fp, k_fp, q_q, k_q, indices),
            brute_local(fixed_q, fixed_k, wide_q, wide_k, indices),
        ),
    ):
        assert found.dtype == torch.float32
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        mine = with_gradients(found, q_q, k_q)
        assert [gradient.dtype for gradient in mine[1:]] == [dtype, dtype]
        assert_near(mine, with_gradients(expected, wide_q, wide_k), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_on_both_sides_is_exactly_zero(dtype: torch.dtype) -> None:
    q, k, _, _ = drawn((3, 61, 16), dtype=dtype)
    same_q, same_k = (x.clone().requires_grad_() for x in (q, k))
    for loss in (
        global_attention_loss(q, k, same_q, same_k, 8),
        local_attention_loss(q, k, same_q, same_k, torch.tensor([7, 20])),
    ):
        assert float(loss.detach()) == 0
        assert all(bool(gradient.eq(0).all()) for gradient in with_gradients(loss, same_q, same_k))


def test_what_takes_gradients() -> None:
    q_fp, k_fp, q_q, k_q = drawn((2, 10, 4))
    q_fp.requires_grad_()
    k_fp.requires_grad_()
    indices = torch.tensor([1, 2])
    (global_attention_loss(q_fp, k_fp, q_q, k_q, 3) + local_attention_loss(q_fp, k_fp, q_q, k_q, indices)).backward()
    assert q_fp.grad is None
    assert k_fp.grad is None
    with torch.no_grad():
        assert not local_attention_loss(q_fp, k_fp, q_q, k_q, indices).requires_grad
    fixed = q_q.detach()
    expected = torch.autograd.grad(brute_local(q_fp, k_fp, fixed, k_q, indices), k_q)
    torch.testing.assert_close(
        torch.autograd.grad(local_attention_loss(q_fp, k_fp, fixed, k_q, indices), k_q), expected
    )


def test_backward_twice() -> None:
    q_fp, k_fp, q_q, k_q = drawn((2, 10, 4))
    loss = local_attention_loss(q_fp, k_fp, q_q, k_q, torch.tensor([1, 2]))
    first = torch.autograd.grad(loss, k_q, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, k_q)[0], first[0])


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_bytes = max(self.num_bytes, result.numel() * result.element_size())
        return result


def test_never_holds_the_maps_or_a_wide_copy() -> None:
    shape, indices = (6, 3000, 8), torch.arange(0, 3000, 3)
    q_fp, k_fp, q_q, k_q = drawn(shape, dtype=torch.bfloat16)
    targets = attention_targets(q_fp, k_fp, stride=1, indices=indices)
    for loss in (global_loss, local_loss):
        with LargestTensor() as seen:
            loss(targets, q_q, k_q, tile_bytes=100_000).backward()
        most = {global_loss: 4, local_loss: 2}[loss] * q_q.numel()  # stride 1 pools to float32, as many as there were
        assert seen.num_bytes <= most
    with LargestTensor() as seen:
        targets = attention_targets(q_fp, k_fp, stride=128, indices=indices)
    assert seen.num_bytes <= 2 * q_q.numel()
    with LargestTensor() as seen:
        global_loss(targets, q_q, k_q).backward()
    assert seen.num_bytes <= 2 * 6 * 3072 * 8


def test_salient_tokens() -> None:
    sums = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, 3.0, 0.0])
    assert salient_tokens(sums, 4).tolist() == [1, 2, 3, 4]
    assert salient_tokens(sums, 1).tolist() == [1]
    assert salient_tokens(sums, 100).tolist() == list(range(7))
    with raises(ValueError, "num", 0):
        salient_tokens(sums, 0)
    with raises(ValueError, "column_sums", "[L]", (1, 7)):
        salient_tokens(sums[None], 2)
    with raises(ValueError, "column_sums", 1, 7):
        salient_tokens(torch.where(sums == 0, torch.nan, sums), 2)


def test_targets_keep_and_move() -> None:
    q, k, q_q, k_q = drawn((2, 10, 4), dtype=torch.bfloat16)
    targets = attention_targets(q, k, stride=4, indices=torch.tensor([9, 0], dtype=torch.int32))
    assert targets.to("cpu").k is targets.k
    assert (targets.shape, targets.stride) == ((2, 10, 4), 4)
    moved = targets.to("meta")
    assert all(
        x is not None and x.is_meta for x in (moved.q_pooled, moved.k_pooled, moved.indices, moved.q_salient, moved.k)
    )
    with raises(ValueError, "meta", "cpu"):
        global_loss(moved, q_q, k_q)
    assert attention_targets(q, k, stride=4).to("cpu").k is None


def test_errors() -> None:
    q, k, q_q, k_q = drawn((2, 6, 4))
    indices = torch.tensor([0, 5])
    broken = k.clone()
    broken[1, 2, 3] = torch.nan
    with raises(ValueError, "k", 1, 48):
        global_attention_loss(q, broken, q_q, k_q, 2)
    with raises(ValueError, "q_q", 1, 48):
        local_attention_loss(q, k, broken, k_q, torch.tensor([2]))
    with raises(ValueError, "q", "k", torch.float32):
        local_attention_loss(q.float(), k.float(), 1e25 * q.float(), 1e25 * k.float(), indices)
    assert not bool(global_loss(attention_targets(q, k, stride=2), broken, k_q).isfinite())
    for stride in (0, -3):
        with raises(ValueError, "stride", stride):
            global_attention_loss(q, k, q_q, k_q, stride)
    for index in (6, -1):
        with raises(ValueError, "indices", index, 6):
            local_attention_loss(q, k, q_q, k_q, torch.tensor([0, index]))
    for wrong in (indices.float(), indices[None], indices[:0], indices.bool()):
        with raises(ValueError, "indices", "[k]"):
            local_attention_loss(q, k, q_q, k_q, wrong)
    with raises(ValueError, "q", "k", (2, 6, 4), (2, 5, 4)):
        global_attention_loss(q, k[:, :5], q_q, k_q, 2)
    with raises(ValueError, "q_q", "k_q", (2, 6, 4), (6, 4)):
        global_attention_loss(q, k, q_q, k_q[0], 2)
    with raises(ValueError, "q_q", "k_q", (2, 5, 4), (2, 6, 4)):
        local_attention_loss(q, k, q_q[:, :5], k_q[:, :5], indices)
    with raises(ValueError, "indices"):
        local_loss(attention_targets(q, k, stride=2), q_q, k_q)
    with raises(ValueError, "stride"):
        global_loss(attention_targets(q, k, indices=indices), q_q, k_q)
    with raises(ValueError, "tile_bytes", 0):
        global_loss(attention_targets(q, k, stride=2), q_q, k_q, tile_bytes=0)
