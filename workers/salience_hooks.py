"""Salience of every candidate, taken by hooks in the same forward passes that generate the trajectory (method §2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.calibration.salience import quantization_salience
from reelquant.calibration.spectral_norm import SpectralNorms
from reelquant.ops.rounding_error.op import rounding_error
from reelquant.quantization.quantizer import fake_quantize
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
    """Collects, for every forward pass of a transformer (= one denoising step of one prompt), the features of `C_quant`.

    Args:
        features: which of them. `block_input` and `weight_error` hook every block or linear; without them a pass costs what
            it costs without hooks.
    """

    def __init__(
        self,
        family: ModuleType,
        transformer: nn.Module,
        *,
        weight_bits: int,
        max_tokens: int,
        features: Collection[str] = FEATURES,
    ) -> None:
        self._family, self._transformer = family, transformer
        self._weight_bits, self._max_tokens = weight_bits, max_tokens
        self._num_text = 0
        self._weight_error = torch.zeros(())
        self._block_norms = SpectralNorms()
        self.salience: dict[str, list[Tensor]] = {name: [] for name in features}
        """Of every feature one tensor a step. `latent`: the paper's, of the patchified latent tokens. `block_input` `[blocks]`:
        spectral norm of `X^T X` of every block's input. `weight_error`: sum over the blocks' linears of
        `||X (Q(W) - W)^T||^2 / ||X W^T||^2`."""
        self.temb: list[Tensor] = []
        """Per step `[d]`: the timestep embedding that the modulation layers read."""
        self.conditions: dict[str, Tensor] = {}
        """Inputs of the transformer that stay the same in all steps, without padding."""
        self.timesteps: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on the model while this is open."""
        config: Any = self._transformer.config
        blocks = [self._transformer.get_submodule(name) for name in self._family.block_names(config)]
        handles = [self._transformer.register_forward_pre_hook(self._begin, with_kwargs=True)]
        handles.append(self._transformer.register_forward_hook(self._end))
        handles.append(self._transformer.get_submodule("time_text_embed").register_forward_hook(self._keep_temb))
        if "block_input" in self.salience:
            handles += [block.register_forward_pre_hook(self._see_block) for block in blocks]
        if "weight_error" in self.salience:
            linears = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
            handles += [layer.register_forward_pre_hook(self._see_layer) for layer in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs["encoder_attention_mask"][0].bool()
        self._num_text = int(mask.sum())
        if not self.conditions:
            self.conditions = {
                "prompt_embeds": kwargs["encoder_hidden_states"][0][mask].cpu(),
                "pooled_embeds": kwargs["pooled_projections"][0].cpu(),
            }
        self.timesteps.append(float(kwargs["timestep"][0]))
        if "latent" in self.salience:
            tokens = self._patches(kwargs["hidden_states"][0].float())
            self.salience["latent"].append(quantization_salience(tokens).cpu())
        self._weight_error = torch.zeros((), device=kwargs["hidden_states"].device)
        self._block_norms = SpectralNorms()

    def _end(self, *_: Any) -> None:
        if "block_input" in self.salience:
            self.salience["block_input"].append(self._block_norms.take())
        if "weight_error" in self.salience:
            self.salience["weight_error"].append(self._weight_error.cpu())

    def _keep_temb(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.temb.append(output[0][0].float().cpu())

    def _see_block(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        video, text = inputs[0][0], inputs[1][0, : self._num_text]
        self._block_norms.add(video, text)

    def _see_layer(self, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        """Computes the layer's output itself: the weight of a sharded model is whole before the layer runs, and not after."""
        rows = inputs[0].reshape(-1, layer.in_features)
        rows = rows[:: max(1, len(rows) // self._max_tokens)]
        self._weight_error = self._weight_error + sampled_weight_error(rows, layer.weight, self._weight_bits)

    def _patches(self, latents: Tensor) -> Tensor:
        """`[C, F, H, W] -> [tokens, C * patch volume]`."""
        config: Any = self._transformer.config
        p, pt = config.patch_size, config.patch_size_t
        channels, frames, height, width = latents.shape
        tiles = latents.reshape(channels, frames // pt, pt, height // p, p, width // p, p)
        return tiles.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, channels * pt * p * p)
