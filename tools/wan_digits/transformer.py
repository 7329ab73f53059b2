"""Stage `transformer`: flow matching on encoded clips of both sizes.

With x0 a normalized latent and noise a standard normal: the input is (1 - sigma) x0 + sigma noise, the timestep 1000 sigma,
the target noise - x0, as flow-matching samplers integrate it. State between calls is small: weights and their exponential
average in bfloat16; the moments of Adam begin again, with a warm-up.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tools.digits.checkpoints import cosine_lr_factor
from tools.wan_digits.autoencoder import ClipPool
from tools.wan_digits.components import bf16, make_transformer, save_whole
from tools.wan_digits.settings import Settings
from tools.wan_digits.text import Embedder

WEIGHTS, AVERAGE = "transformer.safetensors", "average.safetensors"


class Trainer:
    """The model, its average, and how long it was trained."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        torch.manual_seed(settings.seed + 7)
        self.settings, self.folder = settings, folder
        self.model = make_transformer(settings).to(settings.device)
        self.average = make_transformer(settings).to(settings.device).requires_grad_(False)
        self.elapsed_s, self.steps = 0.0, 0
        if (folder / WEIGHTS).exists():
            state = load_file(folder / WEIGHTS)
            self.elapsed_s, self.steps = float(state.pop("elapsed_s")), int(state.pop("steps"))
            self.model.load_state_dict(state)
            self.average.load_state_dict(load_file(folder / AVERAGE))
        else:
            self.average.load_state_dict(self.model.state_dict())
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=settings.device != "cpu"
        )

    def save(self) -> None:
        """Writes both files; each replaces its predecessor whole."""
        progress = {
            "elapsed_s": torch.tensor(self.elapsed_s, dtype=torch.float64),
            "steps": torch.tensor(self.steps, dtype=torch.int64),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in ((AVERAGE, bf16(self.average)), (WEIGHTS, {**bf16(self.model), **progress})):
            save_whole(tensors, self.folder / name)

    def train(self, pools: tuple[ClipPool, ClipPool], embed: Embedder) -> None:
        """Trains for the call's budget, or to the end of the schedule. The first pool is of the small size."""
        settings = self.settings
        generator = torch.Generator(settings.device).manual_seed(settings.seed * 1_000_003 + self.steps)
        if settings.device != "cpu":
            self.model.compile_repeated_blocks(dynamic=False)
        begin, before, saved, losses = time.monotonic(), self.elapsed_s, 0.0, [0.0, 0.0]
        for call in range(settings.call_steps):
            spent = time.monotonic() - begin
            self.elapsed_s = before + spent
            progress = self.elapsed_s / settings.horizon_s
            if spent >= settings.budget_s or progress >= 1:
                break
            every = settings.large_every[progress >= 0.5]
            which = int(call % (every + 1) == every)
            rate = settings.lr * cosine_lr_factor(progress, 0.0) * min(1.0, (call + 1) / settings.warmup)
            loss = self._step(pools[which], embed, rate, generator)
            if call % settings.report_every < every + 1:
                losses[which] = float(loss)
            if call % settings.report_every == every:
                print(f"step {self.steps} {self.elapsed_s:.0f} s, {call + 1} steps in {spent:.0f} s: loss "
                      f"{losses[0]:.4f} small, {losses[1]:.4f} large", flush=True)  # fmt: skip
            if spent - saved > settings.save_every_s:
                saved = spent
                self.save()
        self.save()
        print(f"transformer: {self.steps} steps, {self.elapsed_s:.0f} s of training", flush=True)

    def _step(self, pool: ClipPool, embed: Embedder, rate: float,
              generator: torch.Generator) -> Tensor:  # fmt: skip
        settings = self.settings
        x0, scenes = pool.draw()
        dropped = torch.rand(len(scenes), device=settings.device, generator=generator) < settings.dropped
        loss = flow_loss(self.model, x0, embed(scenes, dropped), settings, generator)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.steps += 1
        decay = min(settings.ema_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach()


def flow_loss(
    model: torch.nn.Module, x0: Tensor, text: Tensor, settings: Settings, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity; sigma is logit-normal, moved towards noise by the sampler's shift.

    Args:
        x0: `[B, 16, F, H, W]` float32.
        text: `[B, text_length, text_dim]`.
    """
    noise = torch.randn(x0.shape, device=x0.device, generator=generator)
    u = torch.sigmoid(1.2 * torch.randn(len(x0), device=x0.device, generator=generator))
    sigma = settings.shift * u / (1 + (settings.shift - 1) * u)
    weight = sigma[:, None, None, None, None]
    with torch.autocast(settings.device, settings.dtype, enabled=settings.device != "cpu"):
        predicted = model(
            hidden_states=(1 - weight) * x0 + weight * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=text.float(),
            return_dict=False,
        )[0]
    return F.mse_loss(predicted.float(), noise - x0)
