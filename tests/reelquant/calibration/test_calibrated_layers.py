"""Where learned clips start, and that nothing is cut off there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reelquant.calibration.calibrated_layers import CalibratedLinear, GroupTransform
from reelquant.quantization.quantizer import fake_quantize
from reelquant.settings.generation import LayerBits
from tests.reelquant.families.test_hunyuan_video_rows import LEARNED

RECIPE = replace(LEARNED, channel_scale="none", rotation="none", weight_layout="per_channel")


def layer(weight: Tensor, bits: int) -> CalibratedLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    transform = GroupTransform(weight.shape[1], bits, RECIPE, initial_scale=None)
    return CalibratedLinear(linear, transform, LayerBits(bits, bits), RECIPE)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_clip_that_starts_at_the_whole_range_cuts_nothing_off(bits: int) -> None:
    """Values on the grid of the whole range lose at most half a step: clips of 0.98 would cut 2.5 steps off at 8 bits."""
    largest = 2 ** (bits - 1) - 1
    codes = torch.arange(-largest, largest + 1.0).repeat(3, 1)
    calibrated = layer(codes / largest, bits)
    assert torch.equal(calibrated.grid().round(calibrated.transformed_weight()).float(), codes)
    for clip, x in ((calibrated.clip(), codes), (calibrated.transform.clip(), 5 * codes)):
        assert isinstance(clip, Tensor)
        assert 0.99 < float(clip.detach().min()) <= float(clip.detach().max()) < 1
        step = float(x.max()) / largest
        assert float((fake_quantize(x, bits, -1, clip.detach()) - x).abs().max()) < 0.5 * step


@pytest.mark.parametrize("bits", [4, 8])
def test_a_clip_below_the_whole_range_starts_where_the_search_found_it(bits: int) -> None:
    weight = torch.randn(2, 4096, generator=torch.Generator().manual_seed(bits))
    weight[1, 7] = 2.0 ** (8 - bits) * 6
    clip = layer(weight, bits).clip()
    assert isinstance(clip, Tensor)
    clip.sum().backward()
    found = clip.detach()
    assert float(found.max()) < 0.999
    if bits == 4:
        assert float(found.min()) < 0.9
