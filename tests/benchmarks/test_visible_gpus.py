import pytest
import torch

from benchmarks.visible_gpus import visible_gpus
from tests.errors import raises


def test_names_are_those_that_the_process_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,GPU-0a")
    assert visible_gpus(2) == ["5", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(3) == ["0", "1", "2"]
    with raises(SystemExit, 4, 3, "CUDA_VISIBLE_DEVICES"):
        visible_gpus(4)
