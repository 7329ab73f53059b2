"""A quantized model without its quantization: plain linear layers, and how many weights there are."""

from __future__ import annotations

import torch
from torch import nn

from reelquant.quantization.linear import QuantizedLinear


def dequantize_linear_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every quantized layer of `model` by a linear one with the weight that acts on the layer's plain input.

    Activations are not quantized any more, so the model computes what its weights alone lost.

    Args:
        model: changed in place, layer by layer on each layer's device.
        dtype: of the new weights.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantized_weight().to(dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear.train(layer.training))


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Number of parameters of `model`, a quantized weight counted as it would be unquantized.

    Args, as of diffusers' `ModelMixin.num_parameters`:
        only_trainable: count those with a gradient; quantized weights have none.
        exclude_embeddings: leave out the weights of `nn.Embedding`.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
    plain = sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in embeddings and (parameter.requires_grad or not only_trainable)
    )
    if only_trainable:
        return plain
    return plain + sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
