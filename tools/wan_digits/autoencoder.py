"""Stage `vae`: the video autoencoder, trained on whole clips, and the stream of clips that it encodes.

diffusers runs it four frames at a time with a cache, which is slow to train. `at_once` runs all frames of a clip together, to
the same result: every convolution is causal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor

from tools.digits.checkpoints import cosine_lr_factor
from tools.wan_digits.components import make_vae
from tools.wan_digits.rendering import Renderer
from tools.wan_digits.scenes import random_scenes
from tools.wan_digits.settings import Clip, Settings


def _resample(self: WanResample, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
    """`WanResample.forward` for all frames of a clip, of which the first is not resampled in time."""
    if self.mode == "upsample3d":
        later = self.time_conv(x[:, :, 1:]).unflatten(1, (2, x.shape[1]))
        x = torch.cat([x[:, :, :1], later.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    frames = x.transpose(1, 2)
    x = self.resample(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
    if self.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


@contextmanager
def at_once() -> Iterator[None]:
    """Within it, the autoencoder's parts take whole clips when they are given no cache."""
    original = WanResample.forward
    WanResample.forward = _resample
    try:
        yield
    finally:
        WanResample.forward = original


def moments(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, logarithm of the variance) float32 of the latents of `[B, 3, F, H, W]`; inside `at_once`."""
    mean, logvar = vae.quant_conv(vae.encoder(video)).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def train_vae(settings: Settings, renderer: Renderer) -> AutoencoderKLWan:
    """Trains until the budget in steps or seconds is spent, and writes the latents' statistics into the configuration."""
    torch.manual_seed(settings.seed + 2)
    torch.backends.cudnn.benchmark = True
    vae = make_vae(settings).to(settings.device)
    generator = torch.Generator(settings.device).manual_seed(settings.seed + 3)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    start, step = time.monotonic(), 0
    while (progress := max(step / settings.vae_steps, (time.monotonic() - start) / settings.vae_budget_s)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine_lr_factor(progress, 0.05)
        # Two small clips take as long as a large one.
        size, batch = (
            (settings.large, settings.vae_batch) if step % 4 == 3 else (settings.small, 4 * settings.vae_batch)
        )
        video = renderer(random_scenes(batch, generator), size, generator)
        with at_once(), torch.autocast(settings.device, settings.dtype, enabled=settings.device != "cpu"):
            mean, logvar = moments(vae, video)
            z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            error = vae.decoder(vae.post_quant_conv(z)).float() - video
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = error.square().mean()
        optimizer.zero_grad()
        (error.abs().mean() + 5 * mse + settings.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % settings.report_every == 0:
            print(
                f"vae step {step} {time.monotonic() - start:.0f} s psnr {float(_psnr(mse.detach())):.2f} dB", flush=True
            )
    vae.eval()
    latents = encode(vae, renderer, settings, settings.large, 4 * settings.vae_batch, generator, scaled=False)
    vae.register_to_config(
        latents_mean=[round(float(x), 4) for x in latents.float().mean((0, 2, 3, 4))],
        latents_std=[round(float(x), 4) for x in latents.float().std((0, 2, 3, 4))],
    )
    print(f"vae: {step} steps, whole clips {measure_psnr(vae, renderer, settings, generator):.2f} dB", flush=True)
    return vae


def _psnr(mse: Tensor) -> Tensor:
    return 10 * torch.log10(4 / mse)


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLWan, renderer: Renderer, settings: Settings, generator: torch.Generator) -> float:
    """PSNR in dB of large clips through the autoencoder as diffusers runs it."""
    video = renderer(random_scenes(settings.vae_batch, generator), settings.large, generator)
    with torch.autocast(settings.device, settings.dtype, enabled=settings.device != "cpu"):
        decoded = vae.decode(vae.encode(video).latent_dist.mode(), return_dict=False)[0]
    return float(_psnr((decoded.float() - video).square().mean()))


@torch.no_grad()
def encode(vae: AutoencoderKLWan, renderer: Renderer, settings: Settings, clip: Clip, num: int,
           generator: torch.Generator, *, scaled: bool = True, scenes: Tensor | None = None) -> Tensor:  # fmt: skip
    """Latents `[num, 16, F, H, W]` bfloat16 of new clips, normalized as the pipeline expects them unless not `scaled`."""
    scenes = random_scenes(num, generator) if scenes is None else scenes
    parts = []
    for some in scenes.split(settings.encode_batch):
        video = renderer(some, clip, generator)
        with at_once(), torch.autocast(settings.device, settings.dtype, enabled=settings.device != "cpu"):
            parts.append(moments(vae, video)[0])
    latents = torch.cat(parts)
    if scaled:
        mean, std = (torch.tensor(x, device=latents.device)[:, None, None, None]
                     for x in (vae.config.latents_mean, vae.config.latents_std))  # fmt: skip
        latents = (latents - mean) / std
    return latents.bfloat16()


class ClipPool:
    """Encoded clips of one size; batches are drawn from it, and the oldest clips give way to new ones."""

    def __init__(self, vae: AutoencoderKLWan, renderer: Renderer, settings: Settings, clip: Clip, seed: int) -> None:
        self._parts = vae, renderer, settings, clip
        self._generator = torch.Generator(settings.device).manual_seed(seed)
        self._scenes = random_scenes(settings.pool, self._generator)
        self._latents = encode(*self._parts, settings.pool, self._generator, scenes=self._scenes)
        self._drawn, self._oldest = 0, 0

    def draw(self) -> tuple[Tensor, Tensor]:
        """(latents `[batch, 16, F, H, W]`, scenes `[batch, 13]`)."""
        _, _, settings, clip = self._parts
        self._drawn += clip.batch
        if self._drawn >= settings.fresh * settings.encode_batch:
            self._drawn = 0
            where = (torch.arange(settings.encode_batch, device=settings.device) + self._oldest) % settings.pool
            self._oldest += settings.encode_batch
            self._scenes[where] = random_scenes(settings.encode_batch, self._generator)
            self._latents[where] = encode(*self._parts, len(where), self._generator, scenes=self._scenes[where])
        picks = torch.randint(settings.pool, (clip.batch,), device=settings.device, generator=self._generator)
        return self._latents[picks].float(), self._scenes[picks]
