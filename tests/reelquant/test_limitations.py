"""The README's limitations of a loaded checkpoint: each is refused with its way out, and the way out works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideoPipeline

import reelquant  # noqa: F401 - teaches diffusers to load the checkpoint
from tests.errors import raises

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "run-1-checkpoint-2" / "checkpoint"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return DiffusionPipeline.from_pretrained(str(CHECKPOINT), dtype=torch.float32)


@pytest.mark.parametrize(
    "said", ["LoRA", "cannot be trained", "`.to(dtype)`", "`from_pipe`", "pipeline.components", "CUDA graphs"]
)
def test_the_readme_says_what_does_not_work(said: str) -> None:
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_no_cast_and_a_second_pipeline_from_the_components(pipeline: Any) -> None:
    with raises(ValueError, "quantized"):
        HunyuanVideoPipeline.from_pipe(pipeline)
    with raises(ValueError, "quantized"):
        pipeline.transformer.half()
    second = HunyuanVideoPipeline(**pipeline.components)
    assert second.transformer is pipeline.transformer
