"""Chooses, block by block and before anything is computed, whether a quantized transformer runs over fused operations.

`transformer.block_fusion` is the choice: `mode` is `auto` (on Hopper GPUs with Triton, in 16 bits), `on` (everywhere; an
obstacle is an error) or `off` (diffusers' own blocks over the single operations). What stands in the way of `auto` is logged
once. Both ways compute the same; `torch.compile`, hooks inside a block and layers on another device take diffusers' own.
"""

from __future__ import annotations

import logging
import weakref
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reelquant.families.family import Family, FusedBlock, family_of_architecture
from reelquant.ops.implementation import obstacle
from reelquant.ops.int8_linear.op import NEEDS
from reelquant.quantization.input_transform import current_activation_bits
from reelquant.quantization.linear import QuantizedLinear

logger = logging.getLogger(__name__)

Mode = Literal["auto", "on", "off"]


class BlockFusion:
    """The choice for all blocks of one transformer.

    Attributes:
        mode: set it between generations.
    """

    def __init__(self, transformer: nn.Module, architecture: str) -> None:
        """Takes over the `forward` of the blocks of `transformer`, whose family has a fused block."""
        self.mode: Mode = "auto"
        self._architecture = architecture
        self._said: set[str] = set()
        self._lengths: tuple[weakref.ref[Tensor], list[int]] | None = None
        for name in self._family.block_names(dict(transformer.config)):  # type: ignore[arg-type]
            block: Any = transformer.get_submodule(name)
            block.forward = partial(_block_forward, self, block)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": None}

    @property
    def _family(self) -> Family:
        return family_of_architecture(self._architecture)

    @property
    def _program(self) -> FusedBlock:
        fused = self._family.fused
        assert fused is not None
        return fused

    def run(
        self,
        block: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Runs `block` over fused operations, or as diffusers does; arguments are those of the block."""
        obstacle = self._obstacle(block, hidden_states, rotary)
        if obstacle is None:
            lengths = self._text_lengths(attention_mask, encoder_hidden_states)
            with torch.no_grad():
                streams = self._program.forward(block, hidden_states, encoder_hidden_states, temb, lengths, rotary)
            self._say("blocks run over fused operations")
            return streams
        if self.mode == "on":
            raise ValueError(
                f"a {type(block).__name__} cannot run fused: {obstacle}; set transformer.block_fusion.mode to auto or off"
            )
        self._say(f"blocks run over single operations: {obstacle}")
        return _own_forward(block, hidden_states, encoder_hidden_states, temb, attention_mask, rotary, *args, **kwargs)

    def _obstacle(self, block: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> str | None:
        if self.mode == "auto" and (reason := _slow_here(hidden)):
            return reason
        if rotary is None:
            return "there is no rotary embedding"
        if (reason := self._program.obstacle(block)) is not None:
            return reason
        for name, module in block.named_modules():
            if module is not block and (module._forward_hooks or module._forward_pre_hooks):
                return f"{name} has hooks, which fused operations would not call"
            if isinstance(module, QuantizedLinear):
                if module.weight_packed.device != hidden.device:
                    return f"{name} is on {module.weight_packed.device}, its input on {hidden.device}"
                if module.spec.activation_bits < 16 <= current_activation_bits(module.spec.activation_bits):
                    return f"{name} has 16-bit activations in this step"
        return None

    def _text_lengths(self, mask: Tensor | None, text: Tensor) -> list[int]:
        """Real text tokens of every sample; read back from the device once a mask, not once a block."""
        if mask is None:
            return [text.shape[1]] * len(text)
        known = self._lengths
        if known is None or known[0]() is not mask:
            num_video = mask.shape[-1] - text.shape[1]  # a mask may be that of the text alone
            found = (mask.reshape(len(mask), -1).sum(dim=1) - num_video).tolist()
            self._lengths = known = (weakref.ref(mask), found)
        return known[1]

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.info(message)


def _slow_here(hidden: Tensor) -> str | None:
    """Why the kernels behind the fused operations would not run for `hidden`."""
    if not hidden.is_cuda:
        return f"the kernels need a CUDA GPU, the model is on {hidden.device}"
    if (reason := obstacle(hidden.device, NEEDS)) is not None:
        return reason
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, the model runs in {hidden.dtype}"
    return None


def fuse_blocks(transformer: nn.Module, architecture: str) -> BlockFusion | None:
    """Gives a quantized transformer its `block_fusion`; None where its family has no fused blocks."""
    if family_of_architecture(architecture).fused is None:
        return None
    fusion = BlockFusion(transformer, architecture)
    transformer.block_fusion = fusion  # type: ignore[assignment]
    return fusion


def unfuse_blocks(transformer: nn.Module) -> None:
    """Gives the blocks of `transformer` their own `forward` back, and takes its `block_fusion` away."""
    for module in transformer.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _block_forward:
            del module.forward
    transformer.__dict__.pop("block_fusion", None)


def _block_forward(fusion: BlockFusion, block: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    if fusion.mode == "off" or torch.compiler.is_compiling():
        return _own_forward(block, *args, **kwargs)
    return fusion.run(block, *args, **kwargs)


def _own_forward(block: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    streams: tuple[Tensor, Tensor] = type(block).forward(block, *args, **kwargs)
    return streams
