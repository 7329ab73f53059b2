"""Stages `vae` and `latents`: the video autoencoder, and the clips it encodes for the transformer.

The VAE of the pipeline works on tiles of 17 frames (`use_framewise_encoding`), so it is trained on clips of 17 frames.
When training ends, each latent channel is centred and scaled to unit variance inside `quant_conv`, and the inverse is
put into `post_quant_conv`: the function stays, and the pipeline's single `scaling_factor` suffices.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from torch import Tensor

from tools.digits.captions import split_captions
from tools.digits.checkpoints import cosine_lr_factor, load_if_present, save_atomically
from tools.digits.components import latent_shape, make_vae
from tools.digits.rendering import DigitBank, caption_table, render
from tools.digits.settings import Settings


def _forward_with_concatenated_padding(self: HunyuanVideoCausalConv3d, hidden_states: Tensor) -> Tensor:
    """Equal to the class's own forward; replicate padding by concatenation, whose backward needs no atomics."""
    width, _, height, _, frames, _ = self.time_causal_padding
    x = hidden_states
    if frames:
        x = torch.cat([x[:, :, :1]] * frames + [x], dim=2)
    if height:
        x = torch.cat([x[:, :, :, :1]] * height + [x] + [x[:, :, :, -1:]] * height, dim=3)
    if width:
        x = torch.cat([x[..., :1]] * width + [x] + [x[..., -1:]] * width, dim=4)
    out: Tensor = self.conv(x)
    return out


@contextmanager
def fast_padding() -> Iterator[None]:
    """Within it, the VAE pads by concatenation: same values, quicker backward on a GPU."""
    original = HunyuanVideoCausalConv3d.forward
    HunyuanVideoCausalConv3d.forward = _forward_with_concatenated_padding
    try:
        yield
    finally:
        HunyuanVideoCausalConv3d.forward = original


def training_table(settings: Settings) -> tuple[Tensor, Tensor]:
    """Caption tables (one-digit, two-digit) of the training combinations on the run's device."""
    one, two = (caption_table(split_captions(n)[0], settings.device) for n in (1, 2))
    return one, two


def sample_rows(tables: tuple[Tensor, Tensor], num: int, num_one: int, generator: torch.Generator) -> Tensor:
    """`num` random rows, the first `num_one` of them from the one-digit table."""
    device = tables[0].device
    picks = [torch.randint(len(t), (n,), device=device, generator=generator)
             for t, n in zip(tables, (num_one, num - num_one), strict=True)]  # fmt: skip
    return torch.cat([t[p] for t, p in zip(tables, picks, strict=True)])


def _loss(vae: AutoencoderKLHunyuanVideo, video: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """(training loss, mean squared error) of one batch of clips [B, 3, F, H, W] in [-1, 1]."""
    with torch.autocast(settings.device, settings.dtype, enabled=settings.dtype != torch.float32):
        posterior = vae.encode(video).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = vae.decode(z, return_dict=False)[0].float() - video
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = error.square().mean()
    return error.abs().mean() + 5 * mse + settings.kl_weight * kl, mse


def train_vae(settings: Settings, bank: DigitBank, run: Path) -> AutoencoderKLHunyuanVideo:
    """Trains until the budget in steps or seconds is spent; a finished VAE in `run` is loaded instead."""
    torch.manual_seed(settings.seed + 2)
    vae = make_vae(settings).to(settings.device)
    done = load_if_present(run / "vae.pt", settings.device)
    if done is not None:
        vae.load_state_dict(done)
        return vae.eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    generator = torch.Generator(settings.device).manual_seed(settings.seed + 3)
    tables = training_table(settings)
    torch.backends.cudnn.benchmark = True
    if settings.channels_last:
        vae.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.vae_lr, betas=(0.9, 0.99), weight_decay=0.0)
    start, step = time.monotonic(), 0
    with fast_padding():
        while (progress := _progress(start, step, settings)) < 1:
            optimizer.param_groups[0]["lr"] = settings.vae_lr * cosine_lr_factor(progress, 0.05)
            rows = sample_rows(tables, settings.vae_batch, settings.vae_batch // 4, generator)
            video = render(bank, rows, settings, generator=generator, times=_window(settings, generator))
            loss, mse = _loss(vae, video, settings)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % settings.report_every == 0:
                psnr = 10 * torch.log10(4 / mse.detach())
                print(f"vae step {step} loss {float(loss.detach()):.4f} psnr {float(psnr):.2f} dB "
                      f"{step * settings.vae_batch / (time.monotonic() - start):.0f} clips/s", flush=True)  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = True
    vae.to(memory_format=torch.contiguous_format).eval()
    _whiten(vae, settings, bank)
    save_atomically(vae.state_dict(), run / "vae.pt")
    print(f"vae done: {step} steps, {time.monotonic() - start:.0f} s, "
          f"psnr {measure_psnr(vae, settings, bank):.2f} dB on whole clips", flush=True)  # fmt: skip
    return vae


def refine_decoder(
    vae: AutoencoderKLHunyuanVideo, settings: Settings, bank: DigitBank, run: Path
) -> AutoencoderKLHunyuanVideo:
    """Trains the decoder alone on whole clips, tiled in time as the pipeline decodes: a later tile begins with a latent
    that is no clip's first. Latents keep their meaning. A finished VAE in `run` is loaded instead."""
    vae = vae.to(settings.device)
    done = load_if_present(run / "vae.pt", settings.device)
    if done is not None:
        vae.load_state_dict(done)
        return vae.eval()
    print(f"vae before: psnr {measure_psnr(vae, settings, bank):.2f} dB on whole clips", flush=True)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.vae_lr, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator(settings.device).manual_seed(settings.seed + 8)
    tables, start, step = training_table(settings), time.monotonic(), 0
    enabled = settings.dtype != torch.float32
    with fast_padding():
        while (progress := _progress(start, step, settings)) < 1:
            optimizer.param_groups[0]["lr"] = settings.vae_lr * cosine_lr_factor(progress, 0.05)
            rows = sample_rows(tables, settings.vae_batch, settings.vae_batch // 4, generator)
            video = render(bank, rows, settings, generator=generator)
            with torch.autocast(settings.device, settings.dtype, enabled=enabled):
                with torch.no_grad():
                    z = vae.encode(video).latent_dist.mode()
                error = vae.decode(z + 0.05 * torch.randn_like(z), return_dict=False)[0].float() - video
            optimizer.zero_grad()
            (error.abs().mean() + 5 * error.square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
    vae.eval()
    save_atomically(vae.state_dict(), run / "vae.pt")
    print(f"vae refined: {step} steps, {time.monotonic() - start:.0f} s, "
          f"psnr {measure_psnr(vae, settings, bank):.2f} dB on whole clips", flush=True)  # fmt: skip
    return vae


def _progress(start: float, step: int, settings: Settings) -> float:
    return max(step / settings.vae_steps, (time.monotonic() - start) / settings.vae_budget_s)


def _window(settings: Settings, generator: torch.Generator) -> Tensor:
    """Times of a random run of `vae_clip_frames` frames of a whole clip."""
    last = settings.num_frames - settings.vae_clip_frames
    first = torch.randint(last + 1, (1,), device=settings.device, generator=generator)
    return (first + torch.arange(settings.vae_clip_frames, device=settings.device)) / (settings.num_frames - 1)


def _sample_clips(settings: Settings, bank: DigitBank, num: int, seed: int) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(settings.seed + seed)
    rows = sample_rows(training_table(settings), num, num // 4, generator)
    return render(bank, rows, settings, generator=generator)


@torch.no_grad()
def _whiten(vae: AutoencoderKLHunyuanVideo, settings: Settings, bank: DigitBank) -> None:
    """Makes each latent channel's mode zero-mean and unit-variance, and the decoder undo it."""
    clips = _sample_clips(settings, bank, 4 * settings.vae_batch, 4)
    modes = torch.cat([vae.encode(part).latent_dist.mode() for part in clips.split(settings.vae_batch)])
    mean, std = modes.mean(dim=(0, 2, 3, 4)), modes.std(dim=(0, 2, 3, 4))
    quant, post = vae.quant_conv, vae.post_quant_conv
    num = len(mean)
    # post(z) = W z + b with z = std * z' + mean
    post.bias += (post.weight.flatten(1) * mean).sum(1)
    post.weight *= std[None, :, None, None, None]
    quant.weight[:num] /= std[:, None, None, None, None]
    quant.bias[:num] = (quant.bias[:num] - mean) / std
    quant.bias[num:] -= 2 * std.log()


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLHunyuanVideo, settings: Settings, bank: DigitBank) -> float:
    """PSNR in dB (peak 1) of whole clips through encode (mode) and decode, both tiled as in the pipeline."""
    clips = _sample_clips(settings, bank, 2 * settings.vae_batch, 5)
    total = 0.0
    for part in clips.split(settings.vae_batch):
        with torch.autocast(settings.device, settings.dtype, enabled=settings.dtype != torch.float32):
            out = vae.decode(vae.encode(part).latent_dist.mode(), return_dict=False)[0]
        total += float(((out.float().clamp(-1, 1) - part) / 2).square().mean()) * len(part)
    return float(-10 * torch.log10(torch.tensor(total / len(clips))))


@torch.no_grad()
def encode_clips(settings: Settings, vae: AutoencoderKLHunyuanVideo, bank: DigitBank, run: Path) -> dict[str, Tensor]:
    """Encodes `num_clips` fresh clips once: {"latents" [N, C, F, H, W] bfloat16, "rows" [N, 4]}, one-digit first."""
    path = run / "latents.pt"
    done: dict[str, Tensor] | None = load_if_present(path, settings.device)
    if done is not None:
        return done
    generator = torch.Generator(settings.device).manual_seed(settings.seed + 6)
    tables, start = training_table(settings), time.monotonic()
    latents = torch.empty(settings.num_clips, *latent_shape(settings), dtype=torch.bfloat16, device=settings.device)
    num_one = int(settings.num_clips * settings.one_digit_frac)
    rows = sample_rows(tables, settings.num_clips, num_one, generator)
    for first in range(0, settings.num_clips, settings.encode_batch):
        part = slice(first, first + settings.encode_batch)
        video = render(bank, rows[part], settings, generator=generator)
        with torch.autocast(settings.device, settings.dtype, enabled=settings.dtype != torch.float32):
            latents[part] = vae.encode(video).latent_dist.mode().to(torch.bfloat16)
    sample = latents[:: max(1, settings.num_clips // 4000)].float()
    # The second phase keeps the scale to which the transformer is used.
    factor = torch.tensor(vae.config.scaling_factor) if settings.refine else (1 / sample.std()).cpu()
    result = {"latents": latents, "rows": rows, "scaling_factor": factor}
    save_atomically(result, path)
    print(f"latents: {settings.num_clips} clips in {time.monotonic() - start:.0f} s, std {float(sample.std()):.4f}, "
          f"mean {float(sample.mean()):.4f}", flush=True)  # fmt: skip
    return result
