"""The same gradients every time: what is asked of torch, and on a GPU what comes of it."""

from collections.abc import Iterator

import pytest
import torch

from reelquant.calibration.sample import Sample
from reelquant.calibration.segment_distillation import DistilledBlock, distill_segment
from reelquant.settings.recipe import Recipe
from tests.reelquant.calibration.test_saved_tensors import LEARNING
from tests.reelquant.narrow_blocks import (
    BLOCKS,
    bits_of,
    calls_of,
    config_of,
    constants_of,
    layout_of,
    new_block,
    streams_of,
)
from workers.process import deterministic_kernels


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(asked[0], warn_only=asked[1])


def mode() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(
    ("before", "inside"),
    [((True, True), (True, False)), ((True, False), (True, False)), ((False, False), (False, False))],
    ids=["as on a GPU", "as on a CPU", "never prepared"],
)
def test_only_deterministic_kernels_if_asked(before: tuple[bool, bool], inside: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    with deterministic_kernels(asked=True):
        assert mode() == inside
    assert mode() == before
    with pytest.raises(KeyError), deterministic_kernels(asked=True):
        raise KeyError
    assert mode() == before, "after an error too"
    with deterministic_kernels(asked=False):
        assert mode() == before


CONFIG = config_of(num_attention_heads=4, attention_head_dim=64, rope_axes_dim=(16, 24, 24))
LAYOUT = layout_of(CONFIG, (4, 6, 64, 64), 32)
"""6,176 tokens: enough for many thread blocks to add to one gradient."""


def learned(recipe: Recipe, dtype: torch.dtype, *, lean: bool = False) -> list[DistilledBlock]:
    torch.manual_seed(0)
    width = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
    rows = torch.randn(2, width).to("cuda", dtype)
    samples = []
    for row in rows:
        streams = streams_of(torch.randn(LAYOUT.num_tokens, width).to(dtype), LAYOUT)
        samples.append(Sample(streams, streams, constants_of(CONFIG, LAYOUT, row.unsqueeze(0)).to("cuda")))
    blocks = {name: new_block(CONFIG, name).to("cuda", dtype) for name in BLOCKS}
    return list(
        distill_segment(
            calls_of(CONFIG), blocks, samples, bits={name: bits_of(name) for name in blocks}, recipe=recipe,
            conditioning_rows=rows, seed_of=len, fall_back=False, progress=lambda *_: None, lean=lean,
        )
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks at it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", LEARNING.values(), ids=LEARNING)
def test_a_gpu_learns_the_same_bits_twice(recipe: Recipe, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    with deterministic_kernels(asked=True):
        first, *others = learned(recipe, dtype), learned(recipe, dtype), learned(recipe, dtype, lean=True)
    for other in others:
        assert [block.result for block in first] == [block.result for block in other]
        for one, again in zip(first, other, strict=True):
            for name, layer in one.layers.items():
                assert torch.equal(layer.codes, again.layers[name].codes), name
