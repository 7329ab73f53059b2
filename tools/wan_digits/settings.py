"""Sizes, seeds and budgets of the Wan digits model, in one frozen dataclass with its presets."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Clip:
    """A size of video, in frames and pixels."""

    num_frames: int
    height: int
    width: int
    digit_px: int
    """Side of the square that holds one 8x8 digit."""
    batch: int
    """Clips a training step takes."""

    def latent_shape(self) -> tuple[int, int, int]:
        """(frames, height, width) of the latent: 4 times fewer on each axis."""
        return (self.num_frames - 1) // 4 + 1, self.height // 4, self.width // 4


@dataclass(frozen=True)
class Settings:
    """Sizes, seeds and budgets of one training. Durations are in seconds."""

    seed: int = 31
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    large: Clip = field(default_factory=lambda: Clip(61, 128, 128, 40, 48))
    """The size of the model's videos."""
    small: Clip = field(default_factory=lambda: Clip(29, 80, 96, 28, 256))
    """The size for tests on CPUs; most of what there is to learn is learned on it, at an eighth of the cost."""
    large_every: tuple[int, int] = (6, 1)
    """A step of the large size comes after so many of the small one, in each half of the schedule (0: always)."""

    text_steps: int = 1500
    text_dim: int = 128
    text_length: int = 512
    """Rows of the text that the transformer sees, zeros behind the prompt: the pipeline's default."""

    vae_width: int = 16
    vae_batch: int = 8
    """Large clips a step, or four times as many small ones."""
    vae_steps: int = 1_000_000
    vae_budget_s: float = 230.0
    kl_weight: float = 1e-4
    encode_batch: int = 64

    num_heads: int = 3
    head_dim: int = 64
    num_layers: int = 7
    ffn_dim: int = 768
    shift: float = 5.0
    dropped: float = 0.1
    """Part of the prompts that are empty in training, for guidance."""
    lr: float = 1.2e-3
    warmup: int = 150
    """Steps; after each resumption anew, as the moments of Adam are not kept."""
    horizon_s: float = 1500.0
    """Seconds of training, over all calls, after which the cosine schedule has reached its floor."""
    budget_s: float = 300.0
    """Seconds of training in this call."""
    call_steps: int = 1_000_000
    """Steps of training in this call."""
    ema_decay: float = 0.9995
    pool: int = 4096
    """Encoded clips of each size that batches are drawn from; the oldest are replaced one after another."""
    fresh: int = 24
    """A clip is used this often on the average before it is replaced."""
    save_every_s: float = 120.0
    report_every: int = 100

    student_steps: int = 4
    """Of the distilled model's generations."""
    substeps: int = 12
    """Steps of the teacher for each of them."""
    student_pool: int = 1024
    """The teacher's trajectories of each size."""
    student_lr: float = 3e-4
    student_budget_s: float = 120.0

    eval_prompts: int = 64
    eval_batch: int = 32
    eval_steps: int = 50
    guidance: float = 5.0

    @property
    def dtype(self) -> torch.dtype:
        """Of products in training: bfloat16 on a GPU."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def smoke() -> Settings:
    """Every stage in seconds on two CPU cores; learns nothing."""
    return Settings(
        device="cpu", large=Clip(9, 32, 32, 12, 2), small=Clip(5, 32, 48, 12, 2), text_steps=3, text_length=48,
        vae_width=4, vae_batch=1, vae_steps=2, encode_batch=2, num_heads=1, head_dim=32, num_layers=1,
        ffn_dim=64, budget_s=60.0, call_steps=4, pool=8, fresh=2, report_every=1, eval_prompts=2, eval_batch=2,
        eval_steps=3, student_steps=2, substeps=2, student_pool=4,
    )  # fmt: skip


PRESETS = {"full": Settings, "smoke": smoke}
