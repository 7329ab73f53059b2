"""The INT8 linear layer with its epilogue: checks, and the choice of an implementation.

    y = (codes @ weight^T) * token_scale * weight_scale + bias          the sum over d in exact integers
    out = y,  gelu(y),  or  residual + gate * y

| implementation | where |
|---|---|
| `reference` | any device |
| `triton` | Hopper (`NEEDS`); n and d multiples of 16 |

Where the kernel does not run, `auto` multiplies by `torch._int_mm` on CUDA from capability 8.0 on, filled up to its shapes,
with the reference's epilogue: exact, so the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from reelquant.ops.architecture import Needs
from reelquant.ops.implementation import Implementation, takes_int_mm, takes_triton
from reelquant.ops.int8_linear.int_mm import integer_product_int_mm
from reelquant.ops.int8_linear.reference import int8_linear_reference

__all__ = ["NEEDS", "Implementation", "int8_linear"]

NEEDS = Needs(("wgmma", "tma", "int8"), shared_kib=209)

MULTIPLE = 16
LARGEST_INPUTS = 131_071
"""So many products of two int8 codes fit in int32 whatever they are."""
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def int8_linear(
    codes: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["gelu_tanh"] | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    implementation: Implementation = "auto",
) -> Tensor:
    """Linear layer of integer codes, exact up to one rounding to float32 and one to the output.

    Shapes: N tokens (any number, at least 1), d inputs, n outputs.

    Args:
        codes: int8 `[N, d]`.
        token_scale: float32 `[N]`: what one step of a token's codes stands for.
        weight: int8 `[n, d]`.
        weight_scale: `[n]` floating: what one step of an output's weights stands for.
        bias: `[n]` floating, or None.
        activation: `gelu_tanh` or None.
        gate: `[n]` floating, a factor in front of what is added to `residual`; not with `activation`.
        residual: `[N, n]` bf16, fp16 or fp32; needs no `gate`. It may be `out` itself, but not overlap it otherwise.
        out: `[N, n]` bf16, fp16 or fp32 to fill; None for a new one of `out_dtype`.
        out_dtype: of a new `out`; bf16, fp16 or fp32.
        implementation: `auto` takes the kernel where it runs.

    `codes`, `weight`, `residual` and `out` may be views with any stride between rows (columns of a wider buffer, rows of
    a joint one), but not between columns. The kernel wants them aligned to 16 bytes, base and row stride.

    Returns: `out`. No gradient passes through it.
    Raises: ValueError for shapes, dtypes or strides that do not fit, or `triton` where the kernel does not run.
    """
    if codes.ndim != 2 or weight.ndim != 2 or codes.shape[1] != weight.shape[1] or not codes.numel() or not len(weight):
        raise ValueError(f"codes must be [N, d] and weight [n, d], got {tuple(codes.shape)} and {tuple(weight.shape)}")
    shape = (len(codes), len(weight))
    if out is None:
        out = torch.empty(shape, dtype=out_dtype, device=codes.device)
    rows = {"codes": codes, "weight": weight, "out": out, "residual": residual}
    vectors = {"token_scale": token_scale, "weight_scale": weight_scale, "bias": bias, "gate": gate}
    problems = [
        *_matrix_problems(rows, shape),
        *_vector_problems(vectors, shape),
        *_device_problems({**rows, **vectors}, codes.device),
    ]
    if residual is not None and _overlaps(residual, out):
        problems.append("residual overlaps out without being the same rows: a tile would read what another has written")
    if codes.shape[1] > LARGEST_INPUTS:
        problems.append(f"d is {codes.shape[1]}; up to {LARGEST_INPUTS} inputs, int32 holds the sum")
    if activation not in (None, "gelu_tanh"):
        problems.append(f"activation is {activation!r}; gelu_tanh or None are possible")
    if gate is not None and (residual is None or activation is not None):
        given = "None" if residual is None else "given"
        problems.append(
            f"a gate goes with a residual and without an activation: residual is {given}, activation {activation!r}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    if takes_triton(implementation, codes.device, unsuited=_unsuited(rows), needs=NEEDS):
        from reelquant.ops.int8_linear.launch import launch_int8_linear

        run: Callable[..., Tensor] = launch_int8_linear
    elif takes_int_mm(implementation, codes.device):
        run = partial(int8_linear_reference, product=integer_product_int_mm)
    else:
        run = int8_linear_reference
    with torch.no_grad():
        return run(
            codes,
            token_scale,
            weight,
            weight_scale,
            bias,
            activation=activation,
            gate=gate,
            residual=residual,
            out=out,
        )


def _matrix_problems(rows: dict[str, Tensor | None], shape: tuple[int, int]) -> list[str]:
    problems = []
    for name, matrix in rows.items():
        if matrix is None:
            continue
        if name in ("codes", "weight"):
            if matrix.dtype != torch.int8:
                problems.append(f"{name} must be int8, got {matrix.dtype}")
        elif matrix.shape != shape or matrix.dtype not in _FLOATS:
            problems.append(f"{name} must be bf16, fp16 or fp32 {list(shape)}, got {matrix.dtype} {list(matrix.shape)}")
        if matrix.shape[-1] > 1 and matrix.stride(-1) != 1:
            problems.append(f"the columns of {name} must lie side by side, its strides are {matrix.stride()}")
    return problems


def _vector_problems(vectors: dict[str, Tensor | None], shape: tuple[int, int]) -> list[str]:
    problems = []
    for name, vector in vectors.items():
        if vector is None:
            continue
        length = shape[0] if name == "token_scale" else shape[1]
        if vector.shape != (length,) or not vector.is_contiguous() or not vector.is_floating_point():
            problems.append(f"{name} must be floating [{length}], contiguous, got {vector.dtype} {list(vector.shape)}")
    return problems


def _device_problems(tensors: dict[str, Tensor | None], device: torch.device) -> list[str]:
    elsewhere = {name: str(x.device) for name, x in tensors.items() if x is not None and x.device != device}
    return [f"all tensors must be on {device} as codes is; elsewhere: {elsewhere}"] if elsewhere else []


def _overlaps(residual: Tensor, out: Tensor) -> bool:
    """Whether some element of `out` lies in memory of `residual`, unless at its own place in it."""
    steps = zip(out.shape, residual.stride(), out.stride(), strict=True)
    if residual.data_ptr() == out.data_ptr() and residual.dtype == out.dtype:
        return any(size > 1 and a != b for size, a, b in steps)
    if residual.device != out.device or residual.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return False
    starts, ends = zip(*(_extent(x) for x in (residual, out)), strict=True)
    if max(starts) >= min(ends):
        return False
    step = out.stride(0) * out.element_size()
    if step != residual.stride(0) * residual.element_size() or step <= 0:
        return True
    # Rows a step apart: columns of one wider buffer, side by side, do not meet.
    widths = [x.shape[1] * x.element_size() for x in (residual, out)]
    apart = (out.data_ptr() - residual.data_ptr()) % step
    return apart < widths[0] or apart + widths[1] > step


def _extent(x: Tensor) -> tuple[int, int]:
    """First byte of a matrix, and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _unsuited(rows: dict[str, Tensor | None]) -> str | None:
    """What the kernel does not take about matrices that fit each other."""
    for name, matrix in rows.items():
        if matrix is None:
            continue
        if matrix.shape[1] % MULTIPLE:
            return f"{name} has {matrix.shape[1]} columns, no multiple of {MULTIPLE}"
        if matrix.data_ptr() % 16 or matrix.stride(0) * matrix.element_size() % 16:
            return f"{name} is not aligned to 16 bytes (address {matrix.data_ptr():#x}, strides {matrix.stride()})"
    return None
