"""Salience of every candidate, taken by hooks in the same forward passes that generate the trajectory (method §2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reelquant.calibration.block_call import arguments, real_text, streams_of
from reelquant.calibration.input_groups import block_calls
from reelquant.calibration.salience import quantization_salience
from reelquant.calibration.spectral_norm import SpectralNorms
from reelquant.families.family import Family
from reelquant.ops.rounding_error.op import rounding_error
from reelquant.quantization.quantizer import fake_quantize
from reelquant.tokens import Grid
from workers.candidates import FEATURES

WEIGHT_VALUES = 2**23
"""Values of a weight that are widened to float32 at a time. Every output has its own scale: it may be cut between them."""
HALF_WEIGHT_VALUES = 2**25
"""Values of a weight whose errors are held at a time in 16 bits."""


def sampled_weight_error(rows: Tensor, weight: Tensor, bits: int) -> Tensor:
    """`||X (Q(W) - W)^T||^2 / ||X W^T||^2`, a float32 scalar: inputs `rows` [n, d], a `weight` [out, d] rounded to `bits`.

    On CUDA 16-bit inputs and weights are multiplied as they are, with float32 sums, and the errors rounded to 16 bits, which
    changes the result by up to 1e-4 of itself; elsewhere all is in float32.
    """
    if rows.is_cuda and rows.dtype == weight.dtype and rows.dtype in (torch.bfloat16, torch.float16):
        signal, noise = _energies_in_16_bits(rows, weight, bits)
    else:
        signal, noise = _energies_in_float32(rows.float(), weight, bits)
    return noise / signal.clamp_min(1e-30)


def _energies_in_float32(rows: Tensor, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    noise = signal = torch.zeros((), device=rows.device)
    for part in weight.split(max(1, WEIGHT_VALUES // weight.shape[1])):
        exact = part.float()
        signal = signal + (rows @ exact.T).square().sum()
        noise = noise + (rows @ (fake_quantize(exact, bits, 1) - exact).T).square().sum()
    return signal, noise


def _energies_in_16_bits(rows: Tensor, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    noise = signal = torch.zeros((), device=rows.device)
    for part in weight.split(max(1, HALF_WEIGHT_VALUES // weight.shape[1])):
        signal = signal + _energy_in_16_bits(rows, part)
        noise = noise + _energy_in_16_bits(rows, rounding_error(part, bits=bits))
    return signal, noise


def _energy_in_16_bits(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(rows, weight.T, out_dtype=torch.float32).square_().sum()


class SalienceHooks:
    """Collects, for every conditional call of a transformer (one a denoising step of one prompt), the features of `C_quant`.

    Args:
        transformers: of one pipeline, alike; one of them is called in each step.
        features: which of them. `block_input` and `weight_error` hook every block or linear; without them a pass costs what
            it costs without hooks.
    """

    def __init__(
        self,
        family: Family,
        transformers: Sequence[nn.Module],
        *,
        weight_bits: int,
        max_tokens: int,
        features: Collection[str] = FEATURES,
    ) -> None:
        self._family, self._transformers = family, transformers
        self._weight_bits, self._max_tokens = weight_bits, max_tokens
        self._config: Any = transformers[0].config
        self._watched = False
        self._real: Tensor | slice = slice(None)
        self._weight_error = torch.zeros(())
        self._block_norms = SpectralNorms()
        self.salience: dict[str, list[Tensor]] = {name: [] for name in features}
        """Of every feature one tensor a step. `latent`: the paper's, of the patchified latent tokens. `block_input` `[blocks]`:
        spectral norm of `X^T X` of every block's input. `weight_error`: sum over the blocks' linears of
        `||X (Q(W) - W)^T||^2 / ||X W^T||^2`."""
        self.conditioning: list[Tensor] = []
        """Per call `[B, d]`: what the modulation layers read, of all branches; empty where the blocks have none."""
        self.timesteps: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on the model while this is open; `begin` tells them of each call."""
        handles = [handle for transformer in self._transformers for handle in self._hooked(transformer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooked(self, transformer: nn.Module) -> list[RemovableHandle]:
        calls = block_calls(self._family, self._config)
        blocks = {name: transformer.get_submodule(name) for name in calls}
        handles = [transformer.register_forward_hook(self._end)]
        first = next(iter(calls))
        modulation = (group for level in calls[first].levels for group in level if group.stream == "conditioning")
        for group in list(modulation)[:1]:
            layer = blocks[first].get_submodule(group.name)
            handles.append(layer.register_forward_pre_hook(self._keep_conditioning))
        if "block_input" in self.salience:
            handles += [block.register_forward_pre_hook(self._see_block, with_kwargs=True) for block in blocks.values()]
        if "weight_error" in self.salience:
            linears = [layer for block in blocks.values() for layer in block.modules() if isinstance(layer, nn.Linear)]
            handles += [layer.register_forward_pre_hook(self._see_layer) for layer in linears]
        return handles

    def begin(self, call: Mapping[str, Any], *, conditional: bool) -> None:
        """A call begins, with these arguments of one video; a conditional one is the last element of its batch."""
        self._watched = conditional
        if not conditional:
            return
        self._real = real_text(self._family, call)
        self.timesteps.append(float(call["timestep"].max()))
        latents = self._family.latents(self._config, call["hidden_states"])
        if "latent" in self.salience:
            tokens = latent_tokens(latents[0].float(), self._family.grid(self._config, call), self._family.channel_axis)
            self.salience["latent"].append(quantization_salience(tokens).cpu())
        self._weight_error = torch.zeros((), device=latents.device)
        self._block_norms = SpectralNorms()

    def _end(self, *_: Any) -> None:
        if not self._watched:
            return
        if "block_input" in self.salience:
            self.salience["block_input"].append(self._block_norms.take())
        if "weight_error" in self.salience:
            self.salience["weight_error"].append(self._weight_error.cpu())

    def _keep_conditioning(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.conditioning.append(inputs[0].float().cpu())

    def _see_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._watched:
            video, *text = streams_of(self._family, block, arguments(block, args, kwargs)).values()
            real = (x[-1][self._real] for x in text if x.shape[2] == video.shape[2])
            self._block_norms.add(video[-1], *real)

    def _see_layer(self, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        """Computes the layer's output itself: the weight of a sharded model is whole before the layer runs, and not after."""
        if self._watched:
            rows = inputs[0][-1].reshape(-1, layer.in_features)
            rows = rows[:: max(1, len(rows) // self._max_tokens)]
            self._weight_error = self._weight_error + sampled_weight_error(rows, layer.weight, self._weight_bits)


def latent_tokens(latents: Tensor, grid: Grid, channel_axis: int) -> Tensor:
    """Patches of one video's latents `[tokens, C * patch volume]`.

    Args:
        latents: `[C, F, H, W]` or with the channels elsewhere; or packed tokens `[tokens, C]`.
        grid: of the tokens.
        channel_axis: of the channels in a batch of them.
    """
    if latents.ndim == 2:
        return latents
    latents = latents.movedim(channel_axis - 1, 0)
    channels, *sizes = latents.shape
    (f, pt), (h, ph), (w, pw) = ((number, size // number) for number, size in zip(grid, sizes, strict=True))
    tiles = latents.reshape(channels, f, pt, h, ph, w, pw)
    return tiles.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, channels * pt * ph * pw)
