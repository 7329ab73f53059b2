"""Stage `distill`: a student that takes the teacher's guided trajectories in a few steps, without guidance.

    teacher  x_0 --v--v--v--> x_1 --v--v--v--> x_2 ... video     `substeps` Euler steps of two passes each
    student  x_0 -----v-----> x_1 -----v-----> x_2 ... video     target of a step: (x_{k+1} - x_k) / (sigma_{k+1} - sigma_k)

The student begins as the teacher and learns by regression (knowledge distillation of the sampler, Luhman and Luhman, 2021),
at the noise levels of its own sampler alone.
"""

from __future__ import annotations

import itertools
import time

import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor

from tools.digits.checkpoints import cosine_lr_factor
from tools.wan_digits.scenes import random_scenes
from tools.wan_digits.settings import Clip, Settings
from tools.wan_digits.text import Embedder


def few_step_scheduler(settings: Settings) -> UniPCMultistepScheduler:
    """Euler's method at noise levels that are evenly spaced before the shift."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=settings.shift, solver_order=1,
        disable_corrector=list(range(settings.student_steps)),
    )  # fmt: skip


class Trajectories:
    """The teacher's latents at the student's noise levels, of clips of one size."""

    def __init__(self, teacher: WanTransformer3DModel, embed: Embedder, settings: Settings, clip: Clip) -> None:
        scheduler = few_step_scheduler(settings)
        scheduler.set_timesteps(settings.student_steps, device=settings.device)
        self.timesteps, self.sigmas = scheduler.timesteps, scheduler.sigmas.tolist()
        self._settings, self._clip, self._embed = settings, clip, embed
        self._generator = torch.Generator(settings.device).manual_seed(settings.seed + 11 * clip.height)
        self._scenes = random_scenes(settings.student_pool, self._generator)
        rows = [self._generated(teacher, scenes) for scenes in self._scenes.split(clip.batch)]
        self.latents = torch.cat(rows, dim=1)
        """`[steps + 1, pool, 16, F, H, W]` bfloat16."""

    def _generated(self, teacher: WanTransformer3DModel, scenes: Tensor) -> Tensor:
        """`[steps + 1, B, 16, F, H, W]` bfloat16."""
        settings, num = self._settings, len(scenes)
        shape = num, teacher.config.in_channels, *self._clip.latent_shape()
        x = torch.randn(shape, device=settings.device, generator=self._generator)
        everywhere = torch.ones(num, dtype=torch.bool, device=settings.device)
        texts = torch.cat([self._embed(scenes, everywhere), self._embed(scenes, ~everywhere)])
        kept = [x.bfloat16()]
        for first, last in itertools.pairwise(self.sigmas):
            levels = torch.linspace(_unshifted(first, settings), _unshifted(last, settings), settings.substeps + 1)
            for now, then in itertools.pairwise(_shifted(levels, settings).tolist()):
                timestep = torch.full((2 * num,), 1000 * now, device=settings.device)
                empty, asked = velocity(teacher, torch.cat([x, x]), timestep, texts, settings).chunk(2)
                x = x + (then - now) * (empty + settings.guidance * (asked - empty))
            kept.append(x.bfloat16())
        return torch.stack(kept)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(latents `[batch, 16, F, H, W]`, timesteps `[batch]`, text, velocities that lead to the next latents)."""
        settings, generator, num = self._settings, self._generator, self._clip.batch
        where = torch.randint(len(self._scenes), (num,), device=settings.device, generator=generator)
        step = torch.randint(settings.student_steps, (num,), device=settings.device, generator=generator)
        now, then = (self.latents[step + i, where].float() for i in (0, 1))
        sigmas = torch.tensor(self.sigmas, device=settings.device)
        length = (sigmas[step + 1] - sigmas[step])[:, None, None, None, None]
        text = self._embed(self._scenes[where.to(self._scenes.device)], torch.zeros_like(where, dtype=torch.bool))
        return now, self.timesteps[step], text, (then - now) / length


def _shifted(level: Tensor, settings: Settings) -> Tensor:
    return settings.shift * level / (1 + (settings.shift - 1) * level)


def _unshifted(sigma: float, settings: Settings) -> float:
    return sigma / (settings.shift - (settings.shift - 1) * sigma)


def velocity(model: torch.nn.Module, x: Tensor, timestep: Tensor, text: Tensor, settings: Settings) -> Tensor:
    """The model's, float32."""
    with torch.autocast(settings.device, settings.dtype, enabled=settings.device != "cpu"):
        call = {"hidden_states": x, "timestep": timestep, "encoder_hidden_states": text.float()}
        found: Tensor = model(**call, return_dict=False)[0]
    return found.float()


def distill(student: WanTransformer3DModel, pools: tuple[Trajectories, ...], settings: Settings) -> float:
    """Trains `student` for its budget; returns the last relative squared error of its velocities."""
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    begin, error = time.monotonic(), 0.0
    for step in range(settings.call_steps):
        progress = (time.monotonic() - begin) / settings.student_budget_s
        if progress >= 1:
            break
        x, timestep, text, target = pools[step % len(pools)].draw()
        loss = F.mse_loss(velocity(student, x, timestep, text, settings), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        rate = settings.student_lr * cosine_lr_factor(progress, 0.0) * min(1.0, (step + 1) / settings.warmup)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if step % settings.report_every == 0:
            error = float(loss.detach() / target.square().mean())
            print(f"distill step {step} {time.monotonic() - begin:.0f} s: error {error:.4f}", flush=True)
    return error
