"""What is kept elsewhere for the backward pass comes back as it was, and a step learns the same from it."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reelquant.calibration.saved_tensors import _Shelf
from reelquant.calibration.segment_distillation import DistilledBlock, distill_segment
from reelquant.settings.attention import SparseAttention
from reelquant.settings.recipe import Recipe
from tests.errors import raises
from tests.reelquant.calibration.test_segment_distillation import CALLS, RECIPES, make_samples, outlier_blocks
from tests.reelquant.narrow_blocks import bits_of

GRID = torch.arange(120.0).reshape(2, 3, 4, 5)
TENSORS = {
    "dense": GRID,
    "transposed": GRID.permute(2, 0, 3, 1),
    "with gaps": GRID[:, :, 1:3, ::2],
    "transposed with gaps": GRID[..., 0].transpose(0, 2),
    "at an offset": GRID[1],
    "expanded": GRID[:, :1].expand(2, 7, 4, 5),
    "expanded and transposed": torch.arange(3.0)[:, None].expand(3, 4).T,
    "scalar": torch.tensor(2.5),
    "expanded scalar": torch.tensor(2.5).expand(3, 2),
    "empty": torch.empty(0, 3),
    "bool": GRID > 50,
    "bfloat16": GRID.to(torch.bfloat16).transpose(1, 2),
    "int64": torch.arange(7),
    "not finite": torch.tensor([torch.nan, -torch.inf, -0.0]),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_tensor_comes_back_with_its_values_and_strides(tensor: Tensor) -> None:
    shelf = _Shelf()
    kept = [shelf.put(tensor), shelf.put(GRID + 1)]
    back = shelf.take(kept[0])
    assert (back.shape, back.stride(), back.dtype, back.device) == (
        tensor.shape, tensor.stride(), tensor.dtype, tensor.device,
    )  # fmt: skip
    assert torch.equal(back.contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))
    assert torch.equal(shelf.take(kept[1]), GRID + 1)
    assert torch.equal(shelf.take(kept[0]).nan_to_num(), back.nan_to_num()), "as often as one likes"


def distilled(recipe: Recipe, *, lean: bool) -> list[DistilledBlock]:
    samples, rows = make_samples()
    blocks = outlier_blocks()
    return list(
        distill_segment(
            CALLS, blocks, samples, bits={name: bits_of(name) for name in blocks}, recipe=recipe,
            conditioning_rows=rows, seed_of=len, fall_back=False, progress=lambda *_: None, lean=lean,
        )
    )  # fmt: skip


LEARNING = {name: replace(recipe, epochs=2) for name, recipe in RECIPES.items() if recipe.learns}
LEARNING["sparse"] = replace(LEARNING["s2q"], attention=SparseAttention(density=0.5, calibrate="corrected"))


@pytest.mark.parametrize("recipe", LEARNING.values(), ids=LEARNING)
def test_lean_distillation_gives_the_same_bits(recipe: Recipe) -> None:
    usual, lean = distilled(recipe, lean=False), distilled(recipe, lean=True)
    assert [block.result for block in lean] == [block.result for block in usual]
    for one, other in zip(usual, lean, strict=True):
        assert one.layers.keys() == other.layers.keys()
        for name, layer in one.layers.items():
            assert torch.equal(layer.codes, other.layers[name].codes), name
            assert torch.equal(layer.grid.scale, other.layers[name].grid.scale), name
            for part in ("channel_scale", "rotation", "activation_clip"):
                first, second = getattr(layer, part), getattr(other.layers[name], part)
                assert first is None or torch.equal(first, second), (name, part)


def test_lean_distillation_writes_to_the_folder_for_temporary_files_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    distilled(LEARNING["s2q"], lean=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with raises(FileNotFoundError, "nowhere"):
        distilled(LEARNING["s2q"], lean=True)
    distilled(LEARNING["s2q"], lean=False)
