"""Which implementation runs."""

from __future__ import annotations

import torch

from reelquant.ops.implementation import reference_only, takes_triton
from tests.errors import raises


def test_kernels_are_held_back_for_auto_alone() -> None:
    with reference_only():
        # Nothing is asked of the device, which need not be there.
        assert not takes_triton("auto", torch.device("cuda"))
        with raises(ValueError, "triton", "cpu"):
            takes_triton("triton", torch.device("cpu"))
    with raises(ValueError, "triton", "cpu"):
        takes_triton("triton", torch.device("cpu"))
