"""Settings of the small digits model: one frozen dataclass, and its presets.

Every stage of `tools/train_digits_model.py` reads its sizes, seeds and budgets from here, so that a run is described
by presets and the time budgets given on the command line.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Settings:
    """Sizes, seeds and budgets of one run. Lengths are pixels, durations seconds, unless said otherwise."""

    seed: int = 20
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """Compute dtype of the VAE (autocast) and of the transformer (whose master weights stay float32)."""
    compile_blocks: bool = False
    channels_last: bool = False
    """Memory format of the VAE's training."""
    cudnn_attention: bool = False
    """Attention of the transformer's training through cuDNN alone."""

    num_frames: int = 29
    height: int = 80
    width: int = 96
    digit_px: tuple[float, float] = (28.0, 32.0)
    """Smallest and largest side of the square that holds one 8x8 digit."""

    num_instances: int = 0
    """Images of each digit that clips show, the most typical ones; 0: all (about 180)."""
    lattice_px: float = 0.0
    """Grid of the start positions, which goes with one fixed length of travel; 0: anywhere."""
    refine: bool = False
    """Second phase: start from the trained folder's weights, and train only the VAE's decoder, on whole clips."""

    text_steps: int = 1500
    recognizer_steps: int = 700

    vae_channels: tuple[int, ...] = (16, 32, 64)
    vae_clip_frames: int = 17
    """Frames of a training clip; 17 is also the length of the tiles in which the VAE encodes and decodes."""
    vae_batch: int = 16
    vae_lr: float = 2e-3
    vae_steps: int = 1_000_000
    vae_budget_s: float = 120.0
    kl_weight: float = 3e-4

    num_clips: int = 80_000
    encode_batch: int = 64

    num_heads: int = 3
    head_dim: int = 64
    num_layers: int = 3
    num_single_layers: int = 6
    rope_axes_dim: tuple[int, int, int] = (16, 24, 24)
    shift: float = 3.0
    batch: int = 256
    lr: float = 1e-3
    warmup_frac: float = 0.02
    steps: int = 1_000_000
    horizon_s: float = 800.0
    """Seconds of transformer training, over all calls, after which the cosine schedule has reached its floor."""
    budget_s: float = 300.0
    """Seconds of transformer training in this call."""
    call_steps: int = 1_000_000
    """Steps of transformer training in this call."""
    one_digit_frac: float = 0.25
    ema_decay: float = 0.999
    report_every: int = 200
    save_every: int = 1000

    eval_prompts: int = 32
    eval_steps: int = 16
    eval_batch: int = 16


def full() -> Settings:
    """First phase of the shipped asset, from nothing; meant for one data-centre GPU."""
    return Settings(device="cuda", dtype=torch.bfloat16, compile_blocks=True)


def narrow() -> Settings:
    """Second phase, from the folder that `full` made: fewer images and places, so that every digit becomes legible."""
    return replace(
        full(),
        refine=True,
        num_instances=5,
        lattice_px=8.0,
        digit_px=(30.0, 30.0),
        vae_batch=12,
        vae_lr=5e-4,
        vae_budget_s=30.0,
        num_clips=24_000,
        lr=7e-4,
        horizon_s=335.0,
        budget_s=335.0,
        eval_prompts=64,
    )


def smoke() -> Settings:
    """Every stage in seconds on two CPU cores; learns nothing."""
    return replace(
        Settings(),
        num_frames=9,
        height=32,
        width=48,
        digit_px=(10.0, 12.0),
        text_steps=3,
        recognizer_steps=3,
        vae_channels=(8, 8, 8),
        vae_clip_frames=5,
        vae_batch=2,
        vae_steps=4,
        num_clips=24,
        encode_batch=8,
        num_heads=1,
        head_dim=32,
        num_layers=1,
        num_single_layers=1,
        rope_axes_dim=(8, 12, 12),
        batch=4,
        steps=6,
        report_every=2,
        save_every=1000,
        eval_prompts=2,
        eval_steps=2,
        eval_batch=2,
    )


def narrow_smoke() -> Settings:
    """The second phase at the size of `smoke`."""
    return replace(smoke(), refine=True, num_instances=5, lattice_px=4.0, digit_px=(11.0, 11.0))


PRESETS = {"full": full, "narrow": narrow, "smoke": smoke, "narrow-smoke": narrow_smoke}
