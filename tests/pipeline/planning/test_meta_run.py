"""Counts on the meta device: against what a reader can count, against real tensors, against a measured forward pass."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pipeline.planning.meta_run import META, run_on_meta, tensors_of
from reelquant.families import hunyuan_video
from reelquant.ops.implementation import reference_only
from reelquant.quantization.quantizer import fake_quantize
from workers.model_source import build_on_meta

REFERENCE = Path(__file__).resolve().parents[3] / "configs" / "models" / "hunyuanvideo-13b"


def empty(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META, requires_grad=grad)


def test_peak_is_what_is_alive_at_once() -> None:
    def work() -> Tensor:
        a = empty(1000)  # 4000
        b = a + 1  # 8000
        del a  # 4000
        c = b * 2  # 8000
        return torch.cat([b, c])  # 16000

    assert run_on_meta(work).peak_bytes == 16000


def test_views_share_their_storage_and_weights_count_from_the_beginning() -> None:
    layer = nn.Linear(10, 20, device=META)
    x = empty(5, 10)
    run = run_on_meta(lambda: layer(x.view(1, 5, 10)), holding=[*tensors_of(layer), x])
    assert run.peak_bytes == 4 * (10 * 20 + 20 + 5 * 10 + 5 * 20)
    assert (run.matrix_flops, run.float32_flops) == (0, 2 * 5 * 10 * 20)


def test_products_are_counted_by_the_width_of_their_values_and_in_place_too() -> None:
    a, b = empty(3, 5, 10, dtype=torch.bfloat16), empty(3, 10, 20, dtype=torch.bfloat16)
    run = run_on_meta(lambda: empty(3, 5, 20, dtype=torch.bfloat16).baddbmm_(a, b))
    assert (run.matrix_flops, run.float32_flops, run.moved_bytes) == (2 * 3 * 5 * 10 * 20, 0, 0)
    run = run_on_meta(lambda: empty(3, 5, 20).baddbmm_(a.float(), b.float()))
    assert (run.matrix_flops, run.float32_flops) == (0, 2 * 3 * 5 * 10 * 20)


def test_convolutions_are_counted_by_themselves() -> None:
    layer = nn.Conv3d(2, 4, 3, padding=1, bias=False, device=META)
    run = run_on_meta(lambda: layer(empty(1, 2, 5, 6, 7)))
    assert run.convolution_flops == 2 * (4 * 5 * 6 * 7) * (2 * 27)
    assert run.matrix_flops == 0


def test_moved_is_what_other_operations_read_and_write() -> None:
    layer = nn.Linear(10, 20, device=META)
    x, row = empty(5, 10), empty(10)

    def work() -> None:
        seen = x.view(50).reshape(5, 10).T.T  # views
        torch.empty_like(seen)
        total = seen + row.expand(5, 10)  # reads 50 and 10, writes 50
        total.mul_(2)  # 50, 50
        torch.zeros_like(total)  # 50
        layer(total)  # a matrix product

    assert run_on_meta(work, holding=[*tensors_of(layer), x, row]).moved_bytes == 4 * (110 + 100 + 50)


@pytest.mark.parametrize("keywords", [False, True])
def test_attention_is_fused(keywords: bool) -> None:
    q, k, v = empty(1, 3, 7, 16, grad=True), empty(1, 3, 11, 16), empty(1, 3, 11, 16)

    def work() -> Tensor:
        if keywords:
            return scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None).sum()
        return scaled_dot_product_attention(q, k, v).sum()

    forward, both = run_on_meta(work), run_on_meta(work, gradients=True)
    assert forward.attention_flops == 4 * 3 * 7 * 11 * 16
    assert both.attention_flops == 14 * 3 * 7 * 11 * 16
    assert forward.peak_bytes < 3 * 7 * 16 * 4 + 3 * 7 * 4 + 100  # no [3, 7, 11] scores


def test_backward_counts_twice_the_forward_and_keeps_its_inputs() -> None:
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.GELU(), nn.Linear(64, 64, bias=False)).to(META)
    x = empty(100, 64)
    forward = run_on_meta(lambda: layers(x), holding=[*tensors_of(layers), x])
    learning = run_on_meta(lambda: layers(x).sum(), holding=[*tensors_of(layers), x], gradients=True)
    # The first layer's input needs no gradient: 2 + 3 products instead of 2.
    assert learning.float32_flops == forward.float32_flops * 5 / 2
    assert learning.peak_bytes > forward.peak_bytes


def test_full_size_forward_pass_is_near_the_measured_one() -> None:
    """HunyuanVideo, 720x1280x61, bfloat16, one H100: `torch.cuda.max_memory_allocated` said 30.4 GiB."""
    config = json.loads((REFERENCE / "transformer" / "config.json").read_text())
    model = nn.Module.to(build_on_meta(config, hunyuan_video), torch.bfloat16)
    half = torch.bfloat16
    run = run_on_meta(
        lambda: model(
            hidden_states=empty(1, 16, 16, 90, 160, dtype=half),
            timestep=empty(1, dtype=half),
            encoder_hidden_states=empty(1, 256, 4096, dtype=half),
            encoder_attention_mask=empty(1, 256, dtype=half),
            pooled_projections=empty(1, 768, dtype=half),
            guidance=empty(1, dtype=half),
            return_dict=False,
        ),
        holding=tensors_of(model),
    )
    assert run.peak_bytes / 2**30 == pytest.approx(30.4, rel=0.05)  # 29.9
    # 60 blocks of joint attention over 57,600 + 256 tokens and 24 heads of 128; the refiner's is in the fourth digit.
    assert run.attention_flops == pytest.approx(60 * 4 * 57_856**2 * 3072, rel=1e-3)


def test_fake_quantization_is_counted_as_its_kernels_unless_they_are_held_back() -> None:
    x, clip = empty(100, 64, dtype=torch.bfloat16, grad=True), empty(1, grad=True)

    def work() -> Tensor:
        return fake_quantize(x, 4, -1, clip)

    # Reads x and the clip; writes x rounded and a float32 a row.
    assert run_on_meta(work, holding=[x, clip]).moved_bytes == 2 * (2 * 100 * 64) + 4 + 4 * 100
    with reference_only():
        assert run_on_meta(work, holding=[x, clip]).moved_bytes > 50 * 100 * 64
