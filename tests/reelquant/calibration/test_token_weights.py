from __future__ import annotations

import pytest
import torch

from reelquant.calibration.token_weights import token_weights
from tests.errors import raises


def test_is_the_formula() -> None:
    sums = torch.rand(101) * 40 + 3
    weights = token_weights(sums)
    expected = (sums - sums.min()) / (sums.max() - sums.min()) * 0.5 + 0.5
    torch.testing.assert_close(weights, expected)
    assert weights.dtype == torch.float32
    assert (float(weights.min()), float(weights.max())) == (0.5, 1.0)
    assert token_weights(torch.tensor([1.0, 2.0, 5.0]), 0.1, 0.5).tolist() == pytest.approx([0.1, 0.2, 0.5])


def test_tokens_that_receive_the_same_all_count_fully() -> None:
    assert token_weights(torch.full((5,), 2.5)).tolist() == [1.0] * 5
    assert token_weights(torch.rand(4), 1.0, 1.0).tolist() == [1.0] * 4


def test_errors() -> None:
    with raises(ValueError, "x", 1, 2):
        token_weights(torch.tensor([1.0, torch.nan]))
    with raises(ValueError, "lambda_min", "lambda_max", 1.0, 0.5):
        token_weights(torch.ones(2), 1.0, 0.5)
    with raises(ValueError, "column_sums", "[L]", (2, 2)):
        token_weights(torch.ones(2, 2))
