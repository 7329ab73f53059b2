"""A transformer's outputs as if the weights of its blocks were rounded, its weights left alone; for sharded ones too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from reelquant.families.family import Family
from reelquant.quantization.weight_grid import fake_quantize_weight

BITS = 4


@contextmanager
def rounded_blocks(family: Family, transformer: Any) -> Iterator[None]:
    """While open, every linear layer of the blocks works with weights rounded to nearest at `BITS` bits, a scale an output.

    What rounding adds is made in the layer's forward pre-hook, where its weight is whole however the model is sharded.
    """
    names = tuple(f"{name}." for name in family.block_names(transformer.config))
    added: dict[nn.Module, Tensor] = {}

    def before(layer: Any, args: tuple[Tensor, ...]) -> None:
        added[layer] = linear(args[0], _rounding_error(layer.weight))

    def after(layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + added.pop(layer)

    with ExitStack() as stack:
        for name, layer in transformer.named_modules():
            if isinstance(layer, nn.Linear) and name.startswith(names):
                stack.callback(layer.register_forward_pre_hook(before).remove)
                stack.callback(layer.register_forward_hook(after).remove)
        yield


def _rounding_error(weight: Tensor) -> Tensor:
    """Rounded weight less weight, `[n, d]`."""
    wide = weight.float()
    return (fake_quantize_weight(wide, BITS, 1.0, "per_channel") - wide).to(weight.dtype)
