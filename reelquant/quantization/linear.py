"""The quantized linear layer, in plain torch: what defines the result on every device.

Shapes: N tokens, d inputs, n outputs, b the rotation's block. The input is scaled, rotated and quantized per token;
integer codes are multiplied with integer codes, and the product with both scales. Layers that read the same tensor form
a group with one channel scale, rotation and clip: a checkpoint stores them once, with the group's leader, and every layer of
a model has copies of its own (`share_group_tensors`). A layer's forward reads nothing but the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from reelquant.ops.int8_linear.op import int8_linear
from reelquant.ops.weight_expansion.op import expand_weight
from reelquant.quantization.input_transform import KERNEL_DTYPES, quantized_input
from reelquant.quantization.layer_spec import (
    GROUP_SUFFIXES,
    LAYER_SUFFIXES,
    LayerSpec,
    group_problems,
    group_tensors,
    layer_tensors,
)
from reelquant.quantization.packing import unpack_bits
from reelquant.quantization.rotation import rotate_blocks

_DTYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}


class QuantizedLinear(nn.Module):
    """A linear layer with packed integer weights; tensors and their names are those of `reelquant.checkpoint.schema`.

    For inference: no gradient passes through it.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    group_scale: Tensor | None
    channel_scale: Tensor | None
    rotation: Tensor | None
    activation_clip: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LayerSpec,
        *,
        name: str,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Empty tensors of the right shapes, to be filled by `load_state_dict` or by diffusers.

        Args:
            in_features: d.
            out_features: n.
            spec: how the layer is quantized.
            name: the layer's name in the model; it leads its group when `spec.group` is this name. A layer that does
                not lead computes once `share_group_tensors` has given it the group's tensors.
            bias: whether it has one.
            dtype: of the bias only; None for torch's default.
            device: of all tensors.

        Raises:
            ValueError: the rotation's block does not divide `in_features`.
        """
        super().__init__()
        if spec.rotation and in_features % spec.rotation:
            raise ValueError(f"{name}: rotation blocks of {spec.rotation} do not divide its {in_features} inputs")
        self.in_features, self.out_features, self.spec, self.name = in_features, out_features, spec, name
        stored = layer_tensors(name, spec, in_features=in_features, out_features=out_features)
        for suffix in LAYER_SUFFIXES:
            info = stored.get(suffix)
            empty = None if info is None else torch.zeros(info.shape, dtype=_DTYPES[info.dtype], device=device)
            # Copies of what the leader stores are no part of the layer's state.
            self.register_buffer(suffix, empty, persistent=self.leads or suffix not in GROUP_SUFFIXES)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    @property
    def leads(self) -> bool:
        """Whether the group's tensors are stored with this layer."""
        return self.spec.group == self.name

    def share(self, suffix: str, tensor: Tensor) -> None:
        """Takes a copy of a tensor of the group: `suffix` is one of `GROUP_SUFFIXES`."""
        setattr(self, suffix, tensor.detach().to(self.weight_packed.device, copy=True))

    def codes(self) -> Tensor:
        """`[n, d]` int8: the stored codes."""
        return unpack_bits(self.weight_packed, self.spec.weight_bits, self.in_features)

    def integer_weight(self, out: Tensor | None = None) -> Tensor:
        """`[n, d]` int8: the codes, times their group's integer scale in the layout `two_level`; in `out` if it is given."""
        return expand_weight(
            self.weight_packed,
            bits=self.spec.weight_bits,
            num_inputs=self.in_features,
            group_scale=self.group_scale,
            out=out,
        )

    def dequantized_weight(self) -> Tensor:
        """`[n, d]` float32: the weight that acts on the untransformed input, activations not quantized."""
        weight = self.integer_weight().float() * self.weight_scale[:, None]
        if self.rotation is not None:
            weight = rotate_blocks(weight, self.rotation.float().T.contiguous())
        return weight if self.channel_scale is None else weight / self.channel_scale

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`x [..., d] -> [..., n]`, in `x`'s dtype.

        Raises:
            ValueError: the layer follows a leader whose tensors it was not given.
        """
        spec = self.spec
        if (
            (spec.channel_scale and self.channel_scale is None)
            or (spec.rotation and self.rotation is None)
            or (spec.activation_bits < 16 and self.activation_clip is None)
        ):
            raise ValueError(
                f"{self.name}: lacks the tensors of its group {spec.group!r}: call share_group_tensors first"
            )
        # Compiled code sees one operation: neither bit widths nor the thread's activation bits are compiled into it.
        compute = torch.ops.reelquant.quantized_linear if torch.compiler.is_compiling() else _quantized_linear
        out: Tensor = compute(
            x,
            self.weight_packed,
            self.weight_scale,
            self.group_scale,
            self.channel_scale,
            self.rotation,
            self.activation_clip,
            self.bias,
            spec.weight_bits,
            spec.activation_bits,
        )
        return out

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight_bits={self.spec.weight_bits}, activation_bits={self.spec.activation_bits}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves the tensors, but keeps the dtypes that the format prescribes when the model's dtype is changed."""
        before = {suffix: self._buffers[suffix] for suffix in LAYER_SUFFIXES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for suffix, old in before.items():
            new = self._buffers[suffix]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[suffix] = old.to(device=new.device)
        return self


def replace_linear_layers(model: nn.Module, layers: Mapping[str, LayerSpec]) -> dict[str, QuantizedLinear]:
    """Replaces linear layers of `model` by empty quantized ones on the same device.

    From then on `model.load_state_dict` gives every layer its group's tensors.

    Args:
        model: changed in place.
        layers: specification by layer name.

    Returns:
        the new layers by name.

    Raises:
        ValueError: names every layer that does not exist, is not linear, does not fit its rotation, or whose group is
            impossible. The model is then unchanged.
    """
    modules = dict(model.named_modules())
    problems = group_problems(layers)
    for name, spec in layers.items():
        linear, leader = modules.get(name), modules.get(spec.group)
        if not isinstance(linear, nn.Linear):
            found = "does not exist" if linear is None else f"is {type(linear).__name__}, not Linear"
            problems.append(f"{name}: {found} in {type(model).__name__}")
        elif spec.rotation and linear.in_features % spec.rotation:
            problems.append(f"{name}: rotation blocks of {spec.rotation} do not divide its {linear.in_features} inputs")
        elif isinstance(leader, nn.Linear) and leader.in_features != linear.in_features:
            problems.append(
                f"{name}: has {linear.in_features} inputs, its group's leader {spec.group!r} {leader.in_features}"
            )
    if problems:
        raise ValueError("the layers to quantize do not fit the model: " + "; ".join(problems))
    quantized = {name: _empty_like(cast(nn.Linear, modules[name]), name, spec) for name, spec in layers.items()}
    for name, layer in quantized.items():
        parent, _, leaf = name.rpartition(".")
        # Through __setattr__ of the parent, so that lists and sequences of modules are covered too.
        setattr(model.get_submodule(parent), leaf, layer)
    model.register_load_state_dict_post_hook(_share_after_load)
    return quantized


def share_group_tensors(model: nn.Module) -> None:
    """Gives every quantized layer of `model` copies of what its group's leader holds."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    leaders = {layer.name: layer for layer in layers if layer.leads}
    for layer in layers:
        if not layer.leads:
            for suffix in group_tensors(layer.spec, in_features=layer.in_features):
                layer.share(suffix, getattr(leaders[layer.spec.group], suffix))


def _share_after_load(model: nn.Module, _incompatible_keys: Any) -> None:
    share_group_tensors(model)


def _empty_like(linear: nn.Linear, name: str, spec: LayerSpec) -> QuantizedLinear:
    bias = linear.bias is not None
    layer = QuantizedLinear(
        linear.in_features,
        linear.out_features,
        spec,
        name=name,
        bias=bias,
        dtype=linear.weight.dtype,
        device=linear.weight.device,
    )
    layer.train(linear.training)
    return layer


def _quantized_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor | None,
    channel_scale: Tensor | None,
    rotation: Tensor | None,
    activation_clip: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
) -> Tensor:
    """Computes `QuantizedLinear.forward` from the layer's tensors."""
    in_features = x.shape[-1]
    values, scale = quantized_input(
        x, activation_bits, channel_scale=channel_scale, rotation=rotation, activation_clip=activation_clip
    )
    rows = values.reshape(-1, in_features)
    weight = expand_weight(weight_packed, bits=weight_bits, num_inputs=in_features, group_scale=group_scale)
    if scale is not None and x.is_cuda and x.dtype in KERNEL_DTYPES:
        product = int8_linear(rows, scale.reshape(-1), weight, weight_scale, bias, out_dtype=x.dtype)
        return product.reshape(*x.shape[:-1], len(weight))
    product = _matmul(rows, weight, exact=x.dtype == torch.float32)
    if scale is not None:
        product *= scale.reshape(-1, 1)
    product *= weight_scale
    if bias is not None:
        product += bias
    return product.to(x.dtype).reshape(*x.shape[:-1], len(weight))


_linear_op = torch.library.custom_op("reelquant::quantized_linear", _quantized_linear, mutates_args=())


@_linear_op.register_fake
def _(x: Tensor, weight_packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_packed.shape[0]))


def _matmul(values: Tensor, weight: Tensor, *, exact: bool) -> Tensor:
    """`values [N, d]` times `weight [n, d]` transposed, float32 `[N, n]`.

    Integers of at most 8 bits are exact in bfloat16, so on a GPU the product runs there and is summed in float32; other
    values are rounded to bfloat16 first unless `exact`.
    """
    if values.device.type != "cuda" or (exact and values.is_floating_point()):
        return values.float() @ weight.float().T
    return torch.mm(values.bfloat16(), weight.bfloat16().T, out_dtype=torch.float32)
