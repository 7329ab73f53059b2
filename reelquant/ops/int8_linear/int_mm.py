"""The product of INT8 codes by `torch._int_mm`, on the INT8 units of GPUs without a kernel; torch has it on CPUs too.

Shapes: N tokens, d inputs, n outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLE = 16
"""Rows and columns are filled up to it: cuBLAS takes multiples of 8, and rows at addresses that are multiples of 16."""
LEAST_ROWS = 32
"""cuBLAS takes more than 16."""


def integer_product_int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """`codes [N, d]` int8 times `weight [n, d]` int8 transposed: exact, int32 `[N, n]`, for any N, d and n."""
    num_tokens, num_outputs = len(codes), len(weight)
    a, b = _filled_up(codes, LEAST_ROWS), _filled_up(weight, MULTIPLE)
    return torch._int_mm(a, b.T)[:num_tokens, :num_outputs]


def _filled_up(matrix: Tensor, least_rows: int) -> Tensor:
    """With zeros, to at least so many rows and multiples of `MULTIPLE`; itself where nothing is missing."""
    rows, columns = matrix.shape
    shape = (max(least_rows, _up(rows)), _up(columns))
    if shape == (rows, columns) and matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0:
        return matrix
    filled = matrix.new_zeros(shape)
    filled[:rows, :columns] = matrix
    return filled


def _up(num: int) -> int:
    return -(-num // MULTIPLE) * MULTIPLE
