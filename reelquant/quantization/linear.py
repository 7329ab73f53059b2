"""The quantized linear layer, in plain torch: what defines the result on every device.

Shapes: N tokens, d inputs, n outputs, b the rotation's block. The input is scaled, rotated and quantized per token;
integer codes are multiplied with integer codes, and the product with both scales. Layers that read the same tensor form
a group: its leader holds the transform and computes it once per input tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from reelquant.checkpoint.schema import LAYER_SUFFIXES, LayerSpec, group_problems, layer_tensors
from reelquant.ops.int8_linear.op import int8_linear
from reelquant.ops.weight_expansion.op import expand_weight
from reelquant.quantization.input_transform import KERNEL_DTYPES, InputTransform, QuantizedInput
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
                not lead needs `follow` before it can compute.
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
        expected = layer_tensors(name, spec, in_features=in_features, out_features=out_features)
        for suffix in LAYER_SUFFIXES:
            info = expected.get(suffix)
            empty = None if info is None else torch.zeros(info.shape, dtype=_DTYPES[info.dtype], device=device)
            self.register_buffer(suffix, empty)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self.input_transform = InputTransform(spec.activation_bits) if spec.group == name else None
        # In a tuple, so that torch does not register the leader as a part of this module.
        self._leader: tuple[QuantizedLinear, ...] = ()

    def follow(self, leader: QuantizedLinear) -> None:
        """Takes the transformed input from `leader` from now on.

        Raises:
            ValueError: `leader` leads no group, another one, or one of another width.
        """
        if leader.input_transform is None or leader.name != self.spec.group or leader.in_features != self.in_features:
            raise ValueError(
                f"{self.name}: its group's leader must be {self.spec.group!r} with {self.in_features} inputs, "
                f"not {leader.name!r} with {leader.in_features}"
            )
        self._leader = (leader,)

    def transformed_input(self, x: Tensor) -> QuantizedInput:
        """`x [..., d]` scaled, rotated and quantized by the group's leader."""
        leader = self.leader
        if leader.input_transform is None:
            raise ValueError(f"{self.name}: the leader {leader.name} of its group has no transform")
        return leader.input_transform(
            x,
            channel_scale=leader.channel_scale,
            rotation=leader.rotation,
            activation_clip=leader.activation_clip,
        )

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
        leader = self.leader
        weight = self.integer_weight().float() * self.weight_scale[:, None]
        if leader.rotation is not None:
            weight = rotate_blocks(weight, leader.rotation.float().T.contiguous())
        return weight if leader.channel_scale is None else weight / leader.channel_scale

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`x [..., d] -> [..., n]`, in `x`'s dtype."""
        values, scale = self.transformed_input(x)
        if scale is not None and x.is_cuda and x.dtype in KERNEL_DTYPES:
            rows = values.reshape(-1, self.in_features)
            product = int8_linear(
                rows, scale.reshape(-1), self.integer_weight(), self.weight_scale, self.bias, out_dtype=x.dtype
            )
            return product.reshape(*x.shape[:-1], self.out_features)
        product = _matmul(values.reshape(-1, self.in_features), self.integer_weight(), exact=x.dtype == torch.float32)
        if scale is not None:
            product *= scale.reshape(-1, 1)
        product *= self.weight_scale
        if self.bias is not None:
            product += self.bias
        return product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight_bits={self.spec.weight_bits}, activation_bits={self.spec.activation_bits}"
        )

    @property
    def leader(self) -> QuantizedLinear:
        """The layer of its group that holds what the group shares; itself if that is this one."""
        if self.input_transform is not None:
            return self
        if not self._leader:
            raise ValueError(f"{self.name}: follows {self.spec.group!r}, which it was not given; call follow() first")
        return self._leader[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves the tensors, but keeps the dtypes that the format prescribes when the model's dtype is changed."""
        before = {suffix: self._buffers[suffix] for suffix in LAYER_SUFFIXES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for suffix, old in before.items():
            new = self._buffers[suffix]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[suffix] = old.to(device=new.device)
        if self.input_transform is not None:
            self.input_transform.forget()
        return self


def replace_linear_layers(model: nn.Module, layers: Mapping[str, LayerSpec]) -> dict[str, QuantizedLinear]:
    """Replaces linear layers of `model` by empty quantized ones on the same device, and joins their groups.

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
        raise ValueError(f"{len(problems)} problems with the layers to quantize: " + "; ".join(problems))
    quantized = {name: _empty_like(cast(nn.Linear, modules[name]), name, spec) for name, spec in layers.items()}
    for name, layer in quantized.items():
        if layer.spec.group != name:
            layer.follow(quantized[layer.spec.group])
        parent, _, leaf = name.rpartition(".")
        # Through __setattr__ of the parent, so that lists and sequences of modules are covered too.
        setattr(model.get_submodule(parent), leaf, layer)
    return quantized


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


def _matmul(values: Tensor, weight: Tensor, *, exact: bool) -> Tensor:
    """`values [N, d]` times `weight [n, d]` transposed, float32 `[N, n]`.

    Integers of at most 8 bits are exact in bfloat16, so on a GPU the product runs there and is summed in float32; other
    values are rounded to bfloat16 first unless `exact`.
    """
    if values.device.type != "cuda" or (exact and values.is_floating_point()):
        return values.float() @ weight.float().T
    return torch.mm(values.bfloat16(), weight.bfloat16().T, out_dtype=torch.float32)
