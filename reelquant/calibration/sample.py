"""Calibration samples on their way through the blocks of a segment, in host memory, and where a block is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from reelquant.calibration.attention_distillation import AttentionTargets
from reelquant.calibration.block_call import Constants, Streams
from reelquant.calibration.host_memory import moved, moved_all, page_locked


@dataclass
class Sample:
    """One calibration sample on its way through the blocks of a segment.

    Its tensors may lie in host memory: a block takes one sample at a time to its own device.
    """

    reference: Streams
    """Full precision's."""
    quantized: Streams
    """Those that the quantized blocks so far produce."""
    constants: Constants
    """What the blocks read besides; on their device."""
    target: Streams | None = None
    """What the full-precision block makes of `reference`."""
    weights: Tensor | None = None
    """`[L]`: weights of the self-attention's tokens, None for all ones."""
    attention: AttentionTargets | None = None
    """Of the full-precision block's attention, for the attention terms of the loss."""

    def at(self, block: nn.Module) -> SampleView:
        """The sample where `block` is."""
        return SampleView(self, next(itertools.chain(block.parameters(), block.buffers())).device)

    @property
    def home(self) -> torch.device:
        """Where its streams lie."""
        return next(iter(self.reference.values())).device

    def lock_pages(self) -> None:
        """Puts the streams into page-locked host memory, from which a GPU reads at the rate of its bus."""
        same = self.quantized is self.reference
        self.reference = {name: page_locked(stream) for name, stream in self.reference.items()}
        self.quantized = (
            self.reference if same else {name: page_locked(stream) for name, stream in self.quantized.items()}
        )


class SampleView:
    """A sample on a device: what is read of it is moved there once, what is not read stays; the same tensors at home."""

    def __init__(self, sample: Sample, device: torch.device) -> None:
        self._sample, self.device = sample, device

    @cached_property
    def reference(self) -> Streams:
        """See `Sample`; so are all others."""
        return moved_all(self._sample.reference, self.device)

    @cached_property
    def quantized(self) -> Streams:
        return moved_all(self._sample.quantized, self.device)

    @cached_property
    def constants(self) -> Constants:
        return self._sample.constants.to(self.device)

    @cached_property
    def target(self) -> Streams:
        assert self._sample.target is not None, "prepare_targets comes first"
        return moved_all(self._sample.target, self.device)

    @cached_property
    def weights(self) -> Tensor | None:
        weights = self._sample.weights
        return None if weights is None else moved(weights, self.device)

    @cached_property
    def attention(self) -> AttentionTargets | None:
        attention = self._sample.attention
        return None if attention is None else attention.to(self.device)
