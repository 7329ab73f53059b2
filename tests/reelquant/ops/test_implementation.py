"""Which implementation runs."""

from __future__ import annotations

import pytest
import torch

from reelquant.ops.implementation import reference_only, takes_triton


def test_kernels_are_held_back_for_auto_alone() -> None:
    with reference_only():
        # Nothing is asked of the device, which need not be there.
        assert not takes_triton("auto", torch.device("cuda"))
        with pytest.raises(ValueError, match="it needs CUDA tensors"):
            takes_triton("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="it needs CUDA tensors"):
        takes_triton("triton", torch.device("cpu"))
