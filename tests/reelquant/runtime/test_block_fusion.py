"""Fused blocks compute what diffusers' blocks over quantized layers compute; what they cannot take goes the other way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.calibration.input_groups import block_calls
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.families.hunyuan_video import FAMILY
from reelquant.quantization.layer_spec import LayerSpec
from reelquant.quantization.linear import replace_linear_layers
from reelquant.quantization.packing import pack_bits
from reelquant.quantization.rotation import block_size, hadamard, transform_weight
from reelquant.quantization.weight_grid import fit_per_channel, fit_two_level
from reelquant.runtime.attach import attach_runtime
from reelquant.settings.attention import Residual
from reelquant.settings.generation import StepProtection
from tests.errors import names, raises

LENGTHS = [5, 3]
SPARSE = SparseAttentionSpec(density=0.6, online=True, interval=3, residual=Residual(order=1, rank=16))


def quantized(*, head_dim: int = 16, layout: str = "two_level", bits: tuple[int, int] = (4, 8), **parts: Any) -> Any:
    """A small transformer whose blocks' linears are all quantized, with what `parts` of a specification say."""
    torch.manual_seed(0)
    third = head_dim // 8 * 2
    model: Any = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=head_dim, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=8,
        rope_axes_dim=(head_dim - 2 * third, third, third), patch_size=1, patch_size_t=1,
    )  # fmt: skip
    model.eval().requires_grad_(False)
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for block, call in block_calls(FAMILY, model.config).items():
        for level in call.levels:
            for group in level:
                names = [f"{block}.{name}" for name in group.layers]
                modulation = group.stream == "conditioning"
                # Every modulation layer is a group of its own input in the block: they read one tensor.
                found = quantized_group(model, names, layout, (bits[0], 16 if modulation else bits[1]))
                layers.update(found[0])
                tensors.update(found[1])
    replace_linear_layers(model, layers)
    model.load_state_dict(model.state_dict() | tensors, strict=True)
    attach_runtime(model, QuantizationSpec("W4A8", "test", layers, **parts))
    return model


def quantized_group(
    model: nn.Module, names: list[str], layout: str, bits: tuple[int, int]
) -> tuple[dict[str, LayerSpec], dict[str, Tensor]]:
    transform = bits[1] < 16
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for name in names:
        linear: Any = model.get_submodule(name)
        width = linear.in_features
        scale = 0.5 + torch.arange(width) % 7 / 7 if transform else None
        rotation = hadamard(block_size(width)).bfloat16() if transform else None
        weight = transform_weight(linear.weight.float(), scale, rotation)
        grid = (fit_two_level if layout == "two_level" else fit_per_channel)(weight, bits[0])
        own = {"weight_packed": pack_bits(grid.round(weight), bits[0]), "weight_scale": grid.scale.flatten()}
        if grid.group_scale is not None:
            own["group_scale"] = grid.group_scale
        if name == names[0] and transform:
            assert scale is not None
            assert rotation is not None
            own |= {"channel_scale": scale, "rotation": rotation, "activation_clip": torch.tensor([0.95])}
        own["bias"] = linear.bias
        rotation_size = 0 if rotation is None else len(rotation)
        layers[name] = LayerSpec(bits[0], bits[1], layout, names[0], transform, rotation_size, "0" * 16)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in own.items()}
    return layers, tensors


@torch.no_grad()
def outputs(model: Any, mode: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A generation of four steps, two prompts of different length at once."""
    model.block_fusion.mode = mode
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(LENGTHS), 4, 4, 5, 7, generator=generator).to(device, dtype)
    text = torch.randn(len(LENGTHS), 8, 12, generator=generator).to(device, dtype)
    inputs = {
        "hidden_states": latents,
        "encoder_hidden_states": text,
        "encoder_attention_mask": (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).long().to(device),
        "pooled_projections": torch.randn(len(LENGTHS), 8, generator=generator).to(device, dtype),
        "guidance": torch.tensor([6000.0] * len(LENGTHS), device=device, dtype=dtype),
        "return_dict": False,
    }
    times = (900.0, 700.0, 400.0, 100.0)
    return [model(timestep=torch.tensor([time] * len(LENGTHS), device=device), **inputs)[0] for time in times]


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("layout", ["per_channel", "two_level"])
@pytest.mark.parametrize(
    "parts",
    [{}, {"sparse_attention": SPARSE}, {"step_protection": StepProtection(0.5, 8)}],
    ids=["dense", "sparse", "protected"],
)
def test_fused_blocks_are_the_blocks(layout: str, parts: dict[str, Any]) -> None:
    model = quantized(layout=layout, bits=(4, 6), **parts)
    apart = [error(a, b) for a, b in zip(outputs(model, "on"), outputs(model, "off"), strict=True)]
    # The order of sums differs: 2e-7, where a code does not fall on the other side of a tie.
    assert max(apart) < 2e-3, apart
    assert min(apart) < 1e-5, apart
    # The blocks do something: without their last layer the result is another.
    before = outputs(model, "on")[0]
    model.single_transformer_blocks[1].proj_out.weight_scale *= 1.5
    assert error(outputs(model, "on")[0], before) > 1e-3


def test_what_cannot_run_fused_runs_otherwise_or_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = quantized()
    expected = outputs(model, "off")[0]
    with caplog.at_level(logging.INFO, logger="reelquant.runtime.block_fusion"):
        assert torch.equal(outputs(model, "auto")[0], expected)
        assert torch.equal(outputs(model, "auto")[0], expected)
    [said] = [record.message for record in caplog.records]
    assert names(said, "CUDA", "cpu")
    with (
        hooked(model.transformer_blocks[1].ff),
        raises(ValueError, "HunyuanVideoTransformerBlock", "ff", "block_fusion.mode"),
    ):
        outputs(model, "on")
    apart = quantized()
    query = apart.single_transformer_blocks[0].attn.to_q
    query.spec = replace(query.spec, group=query.name)
    with raises(ValueError, "HunyuanVideoSingleTransformerBlock", "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"):
        outputs(apart, "on")
    sixteen = quantized(bits=(4, 16))
    with raises(ValueError, "attn.to_q", 16, "transformer.block_fusion.mode"):
        outputs(sixteen, "on")
    raised = quantized(step_protection=StepProtection(0.8, 16))
    with raises(ValueError, "attn.to_q", 16, "step"):
        outputs(raised, "on")


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("parts", [{}, {"sparse_attention": SPARSE}], ids=["dense", "sparse"])
def test_kernels_compute_what_the_references_do(head_dim: int, parts: dict[str, Any]) -> None:
    model = quantized(head_dim=head_dim, **parts)
    exact = outputs(model, "on")
    model.to(torch.bfloat16)
    # bfloat16 itself is 0.05 to 0.09 away here, by every path on the CPU; on an H100 the kernels were at 0.055.
    rounding = max(error(a, b) for a, b in zip(outputs(model, "off", dtype=torch.bfloat16), exact, strict=True))
    model.to("cuda")
    for mode in ("auto", "off"):
        found = outputs(model, mode, device="cuda", dtype=torch.bfloat16)
        apart = [error(a.cpu(), b) for a, b in zip(found, exact, strict=True)]
        assert max(apart) < 1.2 * rounding, (mode, apart, rounding)
