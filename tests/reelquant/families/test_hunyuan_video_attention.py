"""The processor's reading of the texts' lengths: once a mask, and never an old one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reelquant.families.hunyuan_video_attention import CoreAttentionProcessor
from tests.errors import raises

LENGTH = 6


class _Sums(TorchDispatchMode):
    """Counts sums: a mask's is read from the device, which waits for all that a GPU has to do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.sum.dim_IntList
        return func(*args, **(kwargs or {}))


def seen_lengths(mask: Tensor) -> list[int]:
    """The lengths that a core is given."""
    found: list[int] = []

    def core(_item: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        found.append(q.shape[1])
        return q

    q = torch.ones(len(mask), LENGTH, 1, 2)
    CoreAttentionProcessor(core)._attend(q, q, q, mask)
    return found


def mask_of(*lengths: int) -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).view(len(lengths), 1, 1, LENGTH)


def test_a_mask_is_read_once_for_all_blocks() -> None:
    mask = mask_of(4, 6, 5)
    with _Sums() as sums:  # type: ignore[no-untyped-call]
        assert [seen_lengths(mask) for _ in range(3)] == [[4, 6, 5]] * 3
    assert sums.count == 1


@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_or_another_mask_is_read_anew(inference: bool) -> None:
    with torch.inference_mode(inference):
        mask = mask_of(4, 6)
        assert seen_lengths(mask) == [4, 6]
        mask[0, ..., 3] = False
        assert seen_lengths(mask) == [3, 6]
        assert seen_lengths(mask_of(2, 5)) == [2, 5]
        assert seen_lengths(mask) == [3, 6]


def test_one_mask_serves_all_videos_or_each_has_its_own() -> None:
    q = torch.randn(2, LENGTH, 1, 2)
    processor = CoreAttentionProcessor(lambda _item, q, _k, _v: q)
    found = processor._attend(q, q, q, mask_of(4))
    assert torch.equal(found[:, :4], q[:, :4])
    with raises(ValueError, 3, 2, "mask"):
        processor._attend(q, q, q, mask_of(4, 4, 4))
