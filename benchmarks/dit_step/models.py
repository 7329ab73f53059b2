"""Both sides of the comparison, of the same random weights: HunyuanVideo-13B in bf16, with FP8 linears, and quantized."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn

from benchmarks.random_model import fill_randomly, transformer_config
from reelquant.attention.sparse_spec import SparseAttentionSpec, dense_threshold
from reelquant.calibration.input_groups import block_calls
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.families.hunyuan_video import FAMILY
from reelquant.noise_schedule import USUAL_STEPS, shifted_levels
from reelquant.ops.band_attention.op import Precision
from reelquant.quantization.layer_spec import LayerSpec
from reelquant.quantization.linear import QuantizedLinear, replace_linear_layers, share_group_tensors
from reelquant.quantization.packing import pack_bits
from reelquant.quantization.rotation import block_size, hadamard, transform_weight
from reelquant.quantization.weight_grid import fit_per_channel
from reelquant.runtime.attach import attach_runtime
from reelquant.runtime.sparse_attention import AttentionPrecision
from reelquant.settings.attention import Residual

TEXT, REAL_TEXT = 256, 60
"""Text tokens with their padding, as the pipeline gives them, and those that are real."""
FP8_LARGEST = 448.0
ROWS_AT_ONCE = 2048


def bf16_transformer(changes: dict[str, int], device: torch.device) -> Any:
    """The model with random weights; `changes` of its configuration make it smaller."""
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel.from_config(transformer_config() | changes)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    return fill_randomly(model)


def inputs_of(model: Any, layout: tuple[int, int, int], *, text: int, real_text: int) -> dict[str, Any]:
    """Arguments of one forward pass but the timestep; `layout` in tokens: frames, rows, columns."""
    config, device = model.config, model.device
    frames, rows, columns = layout
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    patch = config.patch_size
    return {
        "hidden_states": randn(1, config.in_channels, frames * config.patch_size_t, rows * patch, columns * patch),
        "encoder_hidden_states": randn(1, text, config.text_embed_dim),
        "encoder_attention_mask": (torch.arange(text, device=device) < real_text).long()[None],
        "pooled_projections": randn(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], device=device, dtype=torch.bfloat16),
        "return_dict": False,
    }


class UnmaskedProcessor(HunyuanVideoAttnProcessor2_0):
    """diffusers' own without the mask: right where there is no padding."""

    def __call__(  # diffusers passes what the signature names, and warns of the rest
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Any:
        """As its parent."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


class Fp8Linear(nn.Module):
    """e4m3 weights with a scale an output, activations quantized per token: `torch._scaled_mm`."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(dim=1, keepdim=True).float() / FP8_LARGEST
        self.register_buffer("weight", (linear.weight.float() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d] -> [..., n]`."""
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / FP8_LARGEST
        codes = (rows.float() / scale).to(torch.float8_e4m3fn)
        out: Tensor = torch._scaled_mm(
            codes, self.weight.T, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=torch.bfloat16
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])


def with_fp8_linears(model: Any) -> Any:
    """Replaces the token-wise linears of the blocks, in place."""
    for name, call in block_calls(FAMILY, model.config).items():
        for level in call.levels:
            for layer in (f"{name}.{n}" for group in level if group.stream != "conditioning" for n in group.layers):
                parent, _, leaf = layer.rpartition(".")
                setattr(model.get_submodule(parent), leaf, Fp8Linear(model.get_submodule(layer)))
    return model


def quantize_in_place(model: Any, *, weight_bits: int, activation_bits: int) -> Any:
    """Per-channel weights behind a Hadamard rotation, rounded to nearest; then as `from_pretrained` leaves a checkpoint."""
    specs: dict[str, LayerSpec] = {}
    for name, call in block_calls(FAMILY, model.config).items():
        for level in call.levels:
            for group in level:
                names = [f"{name}.{layer}" for layer in group.layers]
                if group.stream == "conditioning":
                    specs |= {one: LayerSpec(weight_bits, 16, "per_channel", one, False, 0, "0" * 16) for one in names}
                else:
                    block = block_size(model.get_submodule(names[0]).in_features)
                    shared = LayerSpec(weight_bits, activation_bits, "per_channel", names[0], True, block, "0" * 16)
                    specs |= dict.fromkeys(names, shared)
    kept = {name: model.get_submodule(name) for name in specs}
    for name, layer in replace_linear_layers(model, specs).items():
        _fill(layer, kept.pop(name))
    share_group_tensors(model)
    attach_runtime(model, QuantizationSpec(f"W{weight_bits}A{activation_bits}", "benchmark", specs))
    return model


def _fill(layer: QuantizedLinear, linear: nn.Linear) -> None:
    device = linear.weight.device
    scale = rotation = None
    if layer.spec.channel_scale:
        # What outlier channels make of SmoothQuant's scale: their size, near 1 elsewhere.
        scale = linear.weight.abs().amax(dim=0).float()
        scale = (scale / scale.median()).clamp(0.25, 4.0)
        rotation = hadamard(layer.spec.rotation).to(device, torch.bfloat16)
        if layer.leads:
            layer.channel_scale, layer.rotation = scale, rotation
            layer.activation_clip = torch.full((1,), 0.98, device=device)
    for start in range(0, len(linear.weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        weight = transform_weight(linear.weight[rows].float(), scale, rotation)
        grid = fit_per_channel(weight, layer.spec.weight_bits)
        layer.weight_packed[rows] = pack_bits(grid.round(weight), layer.spec.weight_bits)
        layer.weight_scale[rows] = grid.scale.flatten()
    layer.bias = linear.bias


def make_sparse(model: Any, spec: SparseAttentionSpec, precision: Precision = "full") -> None:
    """Gives the model sparse attention, all of it in `precision`; again with another specification at will."""
    model._forward_hooks.clear()
    model._forward_pre_hooks.clear()
    attach_runtime(model, QuantizationSpec("", "", {}, sparse_attention=spec))
    model.sparse_attention.precision = AttentionPrecision(sparse=precision, dense=precision)


def sparse_spec(
    config: dict[str, Any], *, density: float, dense_steps: int, interval: int, rank: int
) -> SparseAttentionSpec:
    """Half of the heads of each kind; a residual of order 2 in low rank."""
    heads, _ = FAMILY.num_heads(config)
    return SparseAttentionSpec(
        density=density,
        head_kinds=dict.fromkeys(FAMILY.block_names(config), ("st" * heads)[:heads]),
        dense_above=dense_threshold(dense_steps, shifted_levels(USUAL_STEPS), refreshes=True),
        interval=interval,
        residual=Residual(order=2, rank=rank, extrapolation="linear", storage="low_rank_int8"),
    )
