"""Clips of two moving handwritten digits over a textured background, rendered in batches on any device.

Everything random is continuous and unimodal: a static 1/f field, a drifting low-pass field, a shift of the digits of 1.5 pixels
and a slant of 6 degrees (standard deviations). Each digit keeps to its half of the frame and is reflected at its border.

Shape suffixes: B clips, F frames, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.digits.rendering import load_digit_images, smooth_patches
from tools.wan_digits.scenes import BACKGROUNDS, COLOURS, HANDS, SPEEDS
from tools.wan_digits.settings import Clip

SHIFT_PX = 1.5
SLANT = math.tan(math.radians(6))
PATCH_MARGIN = 10 / 8
"""Side of a patch over the side of the digit it holds."""
LEVEL = (0.2, 0.35, 0.3, 0.3)
STATIC = (0.03, 0.04, 0.10, 0.04)
DRIFTING = (0.03, 0.12, 0.03, 0.04)
"""Brightness, and standard deviation of the fields, of each of `scenes.BACKGROUNDS`."""
BANDS = 0.12
"""Amplitude of the horizontal bands of the last background, 6 in a frame's height."""
DRIFT_PX = (0.5, 0.2)
"""Pixels a frame, x and y."""


def hands() -> Tensor:
    """`[10, 5, 40, 40]`: stroke coverage of five prototypes of each digit.

    The most typical image, then again and again the one that differs most from those taken, among the more typical half.
    """
    images, labels = load_digit_images()
    chosen = []
    for digit in range(10):
        members = images[labels == digit]
        distance = (members - members.mean(0)).square().sum((1, 2))
        members = members[distance.argsort(stable=True)[: len(members) // 2]]
        taken = [0]
        while len(taken) < len(HANDS):
            apart = torch.stack([(members - members[one]).square().sum((1, 2)) for one in taken]).amin(0)
            taken.append(int(apart.argmax()))
        chosen.append(smooth_patches(members[taken])[:, 0])
    return torch.stack(chosen)


@dataclass(frozen=True)
class Renderer:
    """Renders scenes at a size of clip."""

    patches: Tensor
    """As `hands` gives them, on the device of the clips."""

    @torch.no_grad()
    def __call__(self, scenes: Tensor, clip: Clip, generator: torch.Generator) -> Tensor:
        """`[B, 3, F, H, W]` in [-1, 1] for scenes `[B, 13]`."""
        video = self._background(scenes, clip, generator)[:, None].expand(-1, 3, -1, -1, -1)
        colours = torch.tensor(list(COLOURS.values()), device=scenes.device)
        for slot in (0, 1):
            columns = scenes[:, 6 * slot : 6 * slot + 6]
            alpha = self._coverage(columns, slot, clip, generator)[:, None]
            video = torch.lerp(video, colours[columns[:, 2]][:, :, None, None, None], alpha)
        return video * 2 - 1

    def _background(self, scenes: Tensor, clip: Clip, generator: torch.Generator) -> Tensor:
        """Brightness `[B, F, H, W]` in [0, 0.75]."""
        kind, device = scenes[:, 12], scenes.device
        amplitude = [torch.tensor(x, device=device)[kind][:, None, None] for x in (LEVEL, STATIC, DRIFTING)]
        fy = torch.fft.fftfreq(clip.height, device=device)[:, None] * 64
        fx = torch.fft.rfftfreq(clip.width, device=device)[None] * 64
        radius = (fx.square() + fy.square()).sqrt()
        noise = torch.randn(2, len(scenes), clip.height, clip.width, device=device, generator=generator)
        pink, low = torch.fft.rfft2(noise) / torch.stack([radius.clamp(min=1), 1 + (radius / 3) ** 4])[:, None]
        size = (clip.height, clip.width)
        static = torch.fft.irfft2(pink, s=size)
        frames = torch.arange(clip.num_frames, device=device)[:, None, None]
        phase = torch.exp(-2j * torch.pi * frames * (fx * DRIFT_PX[0] + fy * DRIFT_PX[1]) / 64)
        drifting = torch.fft.irfft2(low[:, None] * phase, s=size)
        static, drifting = _unit(static, static), _unit(drifting, drifting[:, :1])
        rows = torch.arange(clip.height, device=device) / clip.height
        bands = BANDS * torch.sin(2 * torch.pi * 6 * rows)[:, None]
        still = amplitude[0] + amplitude[1] * static + bands * (kind == len(BACKGROUNDS) - 1)[:, None, None]
        return (still[:, None] + amplitude[2][:, None] * drifting).clamp(0, 0.75)

    def _coverage(self, columns: Tensor, slot: int, clip: Clip, generator: torch.Generator) -> Tensor:
        """Stroke coverage `[B, F, H, W]` of one digit."""
        device, num = columns.device, len(columns)
        u = torch.randn(num, 3, device=device, generator=generator)
        x, y = path(columns, slot, clip)
        x, y = x + SHIFT_PX * u[:, :1], y + SHIFT_PX * u[:, 1:2]
        half = clip.digit_px * PATCH_MARGIN / 2
        grid_y = (torch.arange(clip.height, device=device) + 0.5 - y[..., None]) / half
        grid_x = (torch.arange(clip.width, device=device) + 0.5 - x[..., None]) / half
        size = (num, clip.num_frames, clip.height, clip.width)
        grid_x = grid_x[:, :, None, :] + SLANT * u[:, 2, None, None, None] * grid_y[..., None]
        grid = torch.stack([grid_x.expand(size), grid_y[..., None].expand(size)], dim=-1)
        grid = grid.reshape(num, clip.num_frames * clip.height, clip.width, 2)
        patches = self.patches[columns[:, 0], columns[:, 1]][:, None]
        return F.grid_sample(patches, grid, align_corners=False).reshape(size)


def _unit(field: Tensor, of: Tensor) -> Tensor:
    """The field over the standard deviation of `of`, each clip for itself."""
    return field / of.flatten(1).std(1).reshape(-1, *[1] * (field.ndim - 1))


def path(columns: Tensor, slot: int, clip: Clip) -> tuple[Tensor, Tensor]:
    """Centres (x, y) `[B, F]` in pixels of a digit by its six columns `[B, 6]`, without the random shift."""
    device = columns.device
    room_x, room_y = clip.width / 2 - clip.digit_px, float(clip.height - clip.digit_px)
    row, column = columns[:, 3] // 4, columns[:, 3] % 4
    angle = columns[:, 4] * (torch.pi / 4)
    speed = torch.tensor(list(SPEEDS.values()), device=device)[columns[:, 5]] * (clip.height / 128)
    times = torch.arange(clip.num_frames, device=device)
    x = _reflected(column[:, None] / 3 * room_x + (speed * angle.cos())[:, None] * times, room_x)
    y = _reflected(row[:, None] / 3 * room_y + (speed * angle.sin())[:, None] * times, room_y)
    return slot * clip.width / 2 + clip.digit_px / 2 + x, clip.digit_px / 2 + y


def _reflected(position: Tensor, room: float) -> Tensor:
    """A straight path folded into [0, `room`]."""
    return room - (position.remainder(2 * room) - room).abs()
