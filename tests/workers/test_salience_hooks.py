"""The weight error that the hooks sample, against the definition in float64; which hooks there are."""

from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from reelquant.families.hunyuan_video import FAMILY
from reelquant.quantization.quantizer import fake_quantize
from workers import salience_hooks
from workers.candidates import FEATURES
from workers.salience_hooks import SalienceHooks, sampled_weight_error


def drawn(n: int, out: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows and a weight with loud channels."""
    generator = torch.Generator().manual_seed(n + out)
    loud = torch.exp(torch.randn(d, generator=generator))
    return torch.randn(n, d, generator=generator) * loud, 0.02 * torch.randn(out, d, generator=generator) / loud.sqrt()


def exact(rows: Tensor, weight: Tensor, bits: int) -> float:
    delta = fake_quantize(weight.float(), bits, 1).double() - weight.double()
    rows = rows.double()
    return float((rows @ delta.T).square().sum() / (rows @ weight.double().T).square().sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_error_is_the_definition(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salience_hooks, "WEIGHT_VALUES", 1000)
    rows, weight = (tensor.to(dtype) for tensor in drawn(17, 45, 130))
    assert float(sampled_weight_error(rows, weight, bits)) == pytest.approx(exact(rows, weight, bits), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "out", "d"), [(1, 4608, 768), (256, 3072, 3072), (256, 3072, 15_360), (100, 999, 1000)])
def test_weight_error_in_16_bits(
    n: int, out: int, d: int, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weight = (tensor.to(dtype) for tensor in drawn(3 * n, out, d))
    rows = rows[::3]
    expected = exact(rows, weight, bits)
    on_gpu = sampled_weight_error(rows.cuda(), weight.cuda(), bits)
    assert float(on_gpu) == pytest.approx(expected, rel=1e-3)
    assert float(sampled_weight_error(rows, weight, bits)) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(salience_hooks, "HALF_WEIGHT_VALUES", 2**20)
    assert float(sampled_weight_error(rows.cuda(), weight.cuda(), bits)) == pytest.approx(float(on_gpu), rel=1e-4)
    apart = torch.empty(out, 2 * d, dtype=dtype, device="cuda")[:, ::2].copy_(weight)
    assert float(sampled_weight_error(rows.cuda(), apart, bits)) == pytest.approx(float(on_gpu), rel=1e-4)


@pytest.mark.gpu
def test_memory_in_16_bits() -> None:
    rows, weight = (torch.randn(n, 3072, dtype=torch.bfloat16, device="cuda") for n in (256, 30_000))
    sampled_weight_error(rows, weight, 4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sampled_weight_error(rows, weight, 4)
    at_once = salience_hooks.HALF_WEIGHT_VALUES
    # The errors of one piece, and its products with the rows.
    assert torch.cuda.max_memory_allocated() - before < 2 * at_once + 4 * 256 * at_once / 3072 + 2**21


@pytest.fixture(scope="module")
def transformer() -> Any:
    """Two blocks with random weights."""
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, rope_axes_dim=(4, 4, 4), num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, mlp_ratio=2.0,
    )  # fmt: skip


def seen(transformer: Any, features: tuple[str, ...]) -> tuple[SalienceHooks, int]:
    """Two passes with the hooks of `features`, and how many of them are on blocks and linears."""
    hooks = SalienceHooks(FAMILY, [transformer], weight_bits=4, max_tokens=16, features=features)
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 4, 6, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": torch.ones(1, 5, 16),
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": torch.ones(1, 8),
        "guidance": torch.tensor([6000.0]),
    }
    with hooks.watching(), torch.no_grad():
        blocks = [transformer.get_submodule(name) for name in FAMILY.block_names(transformer.config)]
        watched = [
            module
            for block in blocks
            for module in block.modules()
            if module in blocks or isinstance(module, nn.Linear)
        ]
        num = sum(len(module._forward_pre_hooks) for module in watched)
        for step in (900.0, 100.0):
            call = {**inputs, "timestep": torch.tensor([step])}
            hooks.begin(call, conditional=True)
            transformer(**call)
            hooks.begin(call, conditional=False)
            transformer(**call)
    assert sum(len(module._forward_pre_hooks) for module in transformer.modules()) == 0
    return hooks, num


def test_only_what_is_recorded_is_computed(transformer: Any) -> None:
    every, num_every = seen(transformer, FEATURES)
    assert {name: [tuple(t.shape) for t in steps] for name, steps in every.salience.items()} == {
        "latent": [(), ()], "block_input": [(2,), (2,)], "weight_error": [(), ()],
    }  # fmt: skip
    for features in (("latent",), ("block_input",), ("latent", "weight_error"), ()):
        hooks, num = seen(transformer, features)
        assert set(hooks.salience) == set(features)
        assert (num > 1) == bool({"block_input", "weight_error"} & set(features)), (
            "one layer of the modulation at least"
        )
        for name, steps in hooks.salience.items():
            assert all(map(torch.equal, steps, every.salience[name]))
        assert hooks.timesteps == [900.0, 100.0]
        assert [tuple(rows.shape) for rows in hooks.conditioning] == [(1, 24)] * 4, "of every branch"
    assert num_every > 2
