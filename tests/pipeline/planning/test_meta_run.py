"""Peaks on the meta device: against what a reader can count, and against measured ones."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pipeline.planning.meta_run import peak_on_meta, tensors_of
from reelquant.calibration.calibrated_layers import best_clip
from reelquant.calibration.without_values import META, answers
from reelquant.families.hunyuan_video import FAMILY
from reelquant.ops.column_sums.op import column_sums
from reelquant.ops.implementation import reference_only
from reelquant.ops.rounding_error.op import rounding_error
from reelquant.quantization.gptq import gptq_round
from reelquant.quantization.quantizer import fake_quantize
from reelquant.quantization.weight_grid import fit_per_channel
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
        c.mul_(2)
        return torch.cat([b, c])  # 16000

    assert peak_on_meta(work) == peak_on_meta(work) == 16000, "operations that are known count as the others"


def test_views_share_their_storage_and_weights_count_from_the_beginning() -> None:
    layer = nn.Linear(10, 20, device=META)
    x = empty(5, 10)
    peak = peak_on_meta(lambda: layer(x.view(1, 5, 10)), holding=[*tensors_of(layer), x])
    assert peak == 4 * (10 * 20 + 20 + 5 * 10 + 5 * 20)


def test_tensors_of_the_host_count_nothing() -> None:
    x = empty(100)
    work = [lambda: torch.ones(1000, device="cpu"), x.cpu, lambda: x.to("cpu", torch.float64)]
    assert [peak_on_meta(do, holding=[x]) for do in work] == [400, 400, 400]


@pytest.mark.parametrize("keywords", [False, True])
def test_attention_is_fused(keywords: bool) -> None:
    q, k, v = empty(1, 3, 7, 16, grad=True), empty(1, 3, 11, 16), empty(1, 3, 11, 16)

    def work() -> None:
        if keywords:
            scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None).sum().backward()
        else:
            scaled_dot_product_attention(q, k, v).sum().backward()

    row = 3 * 7 * 4
    # The output, a number a row, and then three gradients: no [3, 7, 11] scores.
    assert peak_on_meta(work) < row * 16 + row + 2 * (row * 16) + 2 * (3 * 11 * 16 * 4) + 100


def test_a_result_in_a_given_tensor_takes_nothing() -> None:
    """Also of operations without a meta kernel, as torch 2.11's `addmm` with a dtype of its own for the result."""
    library = torch.library.Library("reelquant_tests", "FRAGMENT")
    library.define("negate(Tensor x, *, Tensor(a!) out) -> Tensor(a!)")
    x, gram = torch.empty(64, 32, device=META), torch.empty(32, 32, device=META)

    def work() -> None:
        assert torch.ops.reelquant_tests.negate(x, out=gram) is gram
        torch.addmm(gram, x.T, x, out=gram)

    assert peak_on_meta(work, holding=[x, gram]) == 4 * (64 * 32 + 32 * 32)


def test_a_backward_pass_keeps_its_inputs() -> None:
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.GELU(), nn.Linear(64, 64, bias=False)).to(META)
    x = empty(100, 64)
    forward = peak_on_meta(lambda: layers(x).detach(), holding=[*tensors_of(layers), x])
    assert peak_on_meta(lambda: layers(x).sum().backward(), holding=[*tensors_of(layers), x]) > forward


def test_code_may_ask_for_values() -> None:
    def work() -> None:
        x = empty(3, 4)
        assert bool(x.isfinite().all())
        assert int((~x.isfinite()).sum()) == 0
        assert float(x.sum()) == 1.0
        assert x.tolist() == [[1.0] * 4] * 3
        assert torch.randperm(2, generator=torch.Generator()).tolist() == [0, 0]
        assert len(x[0][x[0] > 0]) == 0
        assert x[x > 0].shape == (0,)
        assert x[~(x > 0)].shape == (12,), "the others"
        assert not x.is_cuda

    def on_gpu() -> None:
        assert empty(3).is_cuda
        assert not torch.ones(3, device="cpu").is_cuda

    peak_on_meta(work)
    peak_on_meta(on_gpu, on_gpu=True)


def test_all_places_of_a_mask_are_taken_without_memory_too() -> None:
    with torch.device("meta"), answers():
        x, mask = torch.empty(3, 4), torch.ones(3, dtype=torch.bool)
        assert torch.cat([x[mask], x[~mask]]).shape == x.shape
        assert x[~mask].shape == (0, 4)
        assert x[mask.clone()].shape == (3, 4)


def test_two_turns_of_a_loop_take_as_much_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    d = 384
    weight, hessian, q = empty(300, d), empty(d, d), empty(5, 2000, 64)

    def peaks() -> list[int]:
        held = [weight, hessian, q]
        return [
            peak_on_meta(lambda: gptq_round(weight, hessian, fit_per_channel(weight, 4)), holding=held),
            peak_on_meta(lambda: best_clip(weight, 4, "two_level"), holding=held),
            peak_on_meta(lambda: column_sums(q, q, tile_bytes=2**20), holding=held),
        ]

    with reference_only():
        twice = peaks()
        for module in ("quantization.gptq", "calibration.calibrated_layers", "ops.column_sums.reference"):
            monkeypatch.setattr(f"reelquant.{module}.turns", lambda values, _: values)
        assert twice == peaks()


def test_full_size_forward_pass_is_near_the_measured_one() -> None:
    """HunyuanVideo, 720x1280x61, bfloat16, one H100: `torch.cuda.max_memory_allocated` said 30.4 GiB."""
    config = json.loads((REFERENCE / "transformer" / "config.json").read_text())
    model = nn.Module.to(build_on_meta(config, FAMILY), torch.bfloat16).requires_grad_(False)
    half = torch.bfloat16
    peak = peak_on_meta(
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
    assert peak / 2**30 == pytest.approx(30.4, rel=0.05)  # 29.9


def test_kernels_are_counted_unless_they_are_held_back() -> None:
    half = torch.bfloat16
    x, clip, weight = empty(100, 64, dtype=half, grad=True), empty(1, grad=True), empty(100, 64, dtype=half)
    q = empty(2, 1000, 64, dtype=half)
    cases = [
        (lambda: fake_quantize(x, 4, -1, clip), 2 * 100 * 64 + 4 * 100),
        (lambda: rounding_error(weight, bits=4), 2 * 100 * 64),
        (lambda: column_sums(q, q), 4 * 1000),
    ]
    for work, made in cases:
        assert peak_on_meta(work) == pytest.approx(made, rel=0.05)
        with reference_only():
            assert peak_on_meta(work) > 2 * made
