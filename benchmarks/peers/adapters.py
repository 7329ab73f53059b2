"""How each tool quantizes the pipeline: one function a tool, one `Peer` a setting.

Quantized are the linears inside the transformer's blocks, modulation included, as far as the tool's own defaults allow;
embedders, text refiner and last layers keep 16 bits. A setting not named here is the tool's default. Groups are of 64
where the tool asks for a size: 128 divides no linear with 192 inputs.

torchao and SDNQ are called through diffusers' quantization configs. diffusers' config for quanto cannot leave out whole
modules, that for bitsandbytes refuses a CPU, that for ModelOpt fails with this release (a row of its own), and GGUF files
have other tensor names: these tools get the loaded module, as their own documentation does it.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from reelquant.diffusers_internals import execution_device

BLOCKS = r"(single_)?transformer_blocks\..*"
OUTSIDE_BLOCKS = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
GROUP_SIZE = 64


@dataclass(frozen=True)
class Opened:
    """The full-precision pipeline that a tool is let loose on."""

    pipeline: Any
    folder: Path
    dtype: torch.dtype
    layers: tuple[str, ...]
    """Full names of the linears inside the blocks."""
    calibrate: Callable[[], None]
    """Generates the calibration prompts with `pipeline`."""


@dataclass(frozen=True)
class Peer:
    """A tool with a setting: a row of the table."""

    name: str
    quantize: Callable[[Opened], Any]
    """Returns the quantized pipeline; it may be the one it was given."""
    weights: str
    activations: str
    setting: str
    """The call, in the tool's words."""
    package: str | None = None
    """The tool's distribution; None needs torch only."""
    value_bits: float | None = None
    """Of a weight, where the tool stores it wider or simulates it; with scales that it keeps in no tensor."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the model, where it is not the reference's."""


def unchanged(opened: Opened) -> Any:
    """The model as it was opened."""
    return opened.pipeline


def torchao(opened: Opened, *, config: str, **arguments: Any) -> Any:
    """torchao's config class `config`, by diffusers' `TorchAoConfig`."""
    import torchao.quantization as ao
    from diffusers import TorchAoConfig

    chosen = ao.FqnToConfig(OrderedDict({f"re:{BLOCKS}": getattr(ao, config)(**arguments)}))
    return _loaded_with(opened, TorchAoConfig(chosen))


def torchao_intx(opened: Opened, *, config: str, granularity: str) -> Any:
    """A config class of int4 weights whose group size is called `granularity`."""
    from torchao.quantization import PerGroup

    weight = {granularity: PerGroup(GROUP_SIZE)}
    return torchao(opened, config=config, weight_dtype=torch.int4, **weight)  # type: ignore[attr-defined]


def torchao_tinygemm(opened: Opened) -> Any:
    """The layout of torch's own 4-bit kernel."""
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    layout = Int4PackingFormat.TILE_PACKED_TO_4D
    return torchao(opened, config="Int4WeightOnlyConfig", group_size=GROUP_SIZE, int4_packing_format=layout)


def quanto(opened: Opened, *, weights: str, activations: str | None = None) -> Any:
    """quanto's `quantize` and `freeze`; with activations, `Calibration` in between."""
    from optimum import quanto as tool

    transformer = opened.pipeline.transformer
    quantized = None if activations is None else getattr(tool, activations)
    tool.quantize(transformer, include=list(opened.layers), weights=getattr(tool, weights), activations=quantized)
    if activations is not None:
        with tool.Calibration():
            opened.calibrate()
    tool.freeze(transformer)
    return opened.pipeline


def sdnq(opened: Opened, **arguments: Any) -> Any:
    """SDNQ's `SDNQConfig`, which diffusers takes; its default skip list keeps what stands outside the blocks."""
    from sdnq import SDNQConfig

    return _loaded_with(opened, SDNQConfig(**arguments))


def bitsandbytes(opened: Opened, *, bits: int) -> Any:
    """`Linear4bit` (NF4, double quantization) or `Linear8bitLt`, put in place as diffusers does it on a GPU."""
    from bitsandbytes import nn as tool

    def replacement(linear: nn.Linear) -> nn.Module:
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        if bits == 8:
            layer = tool.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
            layer.weight = tool.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            layer = tool.Linear4bit(*size, compute_dtype=opened.dtype, quant_type="nf4", compress_statistics=True)
            layer.weight = tool.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
        layer.bias = linear.bias
        replaced: nn.Module = layer.to(linear.weight.device)  # this is what quantizes
        return replaced

    return _replace(opened, replacement)


def gguf(opened: Opened, *, kind: str) -> Any:
    """gguf's Python quantizer, run by diffusers' `GGUFLinear`."""
    import gguf as tool
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    quant_type = getattr(tool.GGMLQuantizationType, kind)

    def replacement(linear: nn.Linear) -> nn.Module:
        layer = GGUFLinear(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype
        )
        blocks = torch.from_numpy(tool.quants.quantize(linear.weight.detach().float().cpu().numpy(), quant_type))
        layer.weight = GGUFParameter(blocks.to(linear.weight.device), quant_type=quant_type)
        layer.bias = linear.bias
        replaced: nn.Module = layer
        return replaced

    return _replace(opened, replacement)


def modelopt(opened: Opened, *, config: str) -> Any:
    """ModelOpt's `mtq.quantize` with one of its presets: calibrated, and simulated in floating point.

    A preset with quantized activations also quantizes what LayerNorms read, the residual stream, to one scale. No other
    tool here does that, and such a row would compare something else: these quantizers are left out.

    Raises:
        ValueError: something other than the blocks' linears is quantized.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    chosen = copy.deepcopy(getattr(mtq, config))
    chosen["quant_cfg"] += [{"quantizer_name": f"{name}.*", "enable": False} for name in OUTSIDE_BLOCKS]
    chosen["quant_cfg"] += [{"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False}]
    transformer = mtq.quantize(opened.pipeline.transformer, chosen, lambda _transformer: opened.calibrate())
    enabled = {
        re.sub(r"\.(weight|input|output)_quantizer(\.\d+)?$", "", name)
        for name, module in transformer.named_modules()
        if isinstance(module, TensorQuantizer) and not isinstance(module, SequentialQuantizer) and module.is_enabled
    }
    if strangers := sorted(enabled - set(opened.layers)):
        raise ValueError(f"{config} quantizes what is no linear of a block: {', '.join(strangers[:3])}, ...")
    opened.pipeline.transformer = transformer
    return opened.pipeline


def modelopt_through_diffusers(opened: Opened) -> Any:
    """diffusers' own `NVIDIAModelOptConfig`."""
    from diffusers import NVIDIAModelOptConfig

    return _loaded_with(opened, NVIDIAModelOptConfig("INT8", modules_to_not_convert=list(OUTSIDE_BLOCKS)))


def _loaded_with(opened: Opened, quantization_config: Any) -> Any:
    """The transformer loaded anew with a quantization config of diffusers."""
    pipeline = opened.pipeline
    pipeline.transformer = (
        type(pipeline.transformer)
        .from_pretrained(
            opened.folder / "transformer",
            quantization_config=quantization_config,
            torch_dtype=opened.dtype,
            local_files_only=True,
            use_safetensors=True,
        )
        .to(execution_device(pipeline))
    )
    return pipeline


def _replace(opened: Opened, replacement: Callable[[nn.Linear], nn.Module]) -> Any:
    transformer = opened.pipeline.transformer
    for name in opened.layers:
        transformer.set_submodule(name, replacement(transformer.get_submodule(name)))
    return opened.pipeline


def block_linears(transformer: nn.Module) -> tuple[str, ...]:
    """Full names of the linears inside the blocks."""
    return tuple(
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(BLOCKS, name)
    )
