"""Stage `check`: are the asked digits shown, where and how they were asked to move?"""

from __future__ import annotations

import torch
from diffusers import WanPipeline
from torch import Tensor

from tools.wan_digits.rendering import path
from tools.wan_digits.scenes import prompt
from tools.wan_digits.settings import Clip, Settings
from workers.recognition import DigitRecognizer, centre_of_mass

NEAR_PX = 6.0
"""Largest mean distance from the asked path, at 128 pixels' height: four standard deviations of the random shift."""


def generate(pipe: WanPipeline, scenes: list[list[int]], settings: Settings, clip: Clip) -> Tensor:
    """Videos `[N, F, H, W, 3]` in [0, 1] on the CPU; prompt i has seed i."""
    pipe.set_progress_bar_config(disable=True)
    videos = []
    for first in range(0, len(scenes), settings.eval_batch):
        part = scenes[first : first + settings.eval_batch]
        frames = pipe(
            [prompt(scene) for scene in part], height=clip.height, width=clip.width, num_frames=clip.num_frames,
            num_inference_steps=settings.eval_steps, guidance_scale=settings.guidance,
            max_sequence_length=settings.text_length, output_type="pt",
            generator=[torch.Generator("cpu").manual_seed(first + i) for i in range(len(part))],
        ).frames  # fmt: skip
        videos.append(frames.float().cpu().permute(0, 1, 3, 4, 2))
    return torch.cat(videos)


def saturation(video: Tensor) -> Tensor:
    """The same shape, every channel the brightest less the darkest: the background is grey, the digits are not."""
    return (video.amax(-1) - video.amin(-1))[..., None].expand_as(video)


def score(
    videos: Tensor, scenes: list[list[int]], recognizer: DigitRecognizer, clip: Clip
) -> tuple[float, float, list[str]]:
    """(part of the videos whose two digits are read, part that follow both paths, what went wrong)."""
    read, moved, failures = 0, 0, []
    for video, scene in zip(videos, scenes, strict=True):
        coloured = saturation(video)
        digits = recognizer.read(coloured, 2)
        distance = _distance(coloured[..., 0], torch.tensor([scene]), clip)
        read += digits == (scene[0], scene[6])
        moved += distance <= NEAR_PX * clip.height / 128
        if digits != (scene[0], scene[6]) or distance > NEAR_PX * clip.height / 128:
            failures.append(f"{prompt(scene)}: read {digits}, {distance:.1f} px from its path")
    return read / len(scenes), moved / len(scenes), failures


def _distance(gray: Tensor, scene: Tensor, clip: Clip) -> float:
    """The larger mean distance of the two digits' centres from their paths, in pixels; a digit's own centre is learned
    from the clip: the mean offset does not count."""
    worst = 0.0
    for slot, half in enumerate(gray.chunk(2, dim=2)):
        x, y = path(scene[:, 6 * slot : 6 * slot + 6], 0, clip)
        apart = centre_of_mass(half) - torch.stack([x[0], y[0]], dim=-1)
        worst = max(worst, float((apart - apart.mean(0)).norm(dim=-1).mean()), float(apart.mean(0).norm()) - NEAR_PX)
    return worst
