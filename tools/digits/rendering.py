"""Videos of moving handwritten digits, rendered in batches on any device.

Shape suffixes: N digit images, B clips, F frames, H height, W width, P side of a patch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.digits.captions import NUM_DIGITS, Caption
from tools.digits.settings import Settings

ORANGE, CYAN, BACKGROUND = (1.0, 0.62, 0.18), (0.2, 0.85, 1.0), (0.03, 0.03, 0.06)
STEP_X, STEP_Y = (-1.0, 1.0, 0.0, 0.0), (0.0, 0.0, -1.0, 1.0)
"""Unit steps of `captions.DIRECTIONS`, y downwards."""
PATCH_MARGIN = 10 / 8
"""Side of a patch over the side of the digit it holds: one empty source pixel on each side of eight."""
IMAGES = Path(__file__).with_name("optdigits.csv.gz")
"""A line an image: 64 pixels of 0 to 16, and the digit (assets/README.md, provenance)."""


@dataclass(frozen=True)
class DigitBank:
    """Real handwriting, upsampled once."""

    patches_N1PP: Tensor
    """Stroke coverage in [0, 1]."""
    order: Tensor
    """[N] indices of the images, grouped by class."""
    start: Tensor
    """[10] first position of each class in `order`."""
    count: Tensor
    """[10] images of each class."""


def load_digit_images() -> tuple[Tensor, Tensor]:
    """(images [1797, 8, 8] in [0, 1], labels [1797])."""
    values = torch.from_numpy(np.loadtxt(IMAGES, delimiter=",", dtype=np.int64))
    return values[:, :64].reshape(-1, 8, 8).float() / 16.0, values[:, 64].contiguous()


def smooth_patches(images_N88: Tensor) -> Tensor:
    """Upsamples 8x8 images to coverage patches [N, 1, 40, 40] with an empty margin."""
    padded = F.pad(images_N88[:, None], (1, 1, 1, 1))
    large = F.interpolate(padded, scale_factor=4, mode="bicubic", align_corners=False)
    return ((large - 0.12) * 1.4).clamp(0, 1)


def most_typical(images_N88: Tensor, labels: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` images of each class that lie nearest to the class's mean, and their labels."""
    kept = []
    for digit in range(NUM_DIGITS):
        members = (labels == digit).nonzero()[:, 0]
        distance = (images_N88[members] - images_N88[members].mean(dim=0)).square().sum(dim=(1, 2))
        kept.append(members[distance.argsort(stable=True)[:num]])
    return images_N88[torch.cat(kept)], labels[torch.cat(kept)]


def make_bank(
    images_N88: Tensor, labels: Tensor, device: str | torch.device = "cpu", *, num_instances: int = 0
) -> DigitBank:
    """Groups the images by class on `device`; with `num_instances`, only the most typical ones."""
    if num_instances:
        images_N88, labels = most_typical(images_N88, labels, num_instances)
    count = torch.bincount(labels, minlength=NUM_DIGITS)
    start = count.cumsum(0) - count
    order = labels.argsort(stable=True)
    return DigitBank(smooth_patches(images_N88).to(device), order.to(device), start.to(device), count.to(device))


def caption_table(captions: list[Caption], device: str | torch.device = "cpu") -> Tensor:
    """[len(captions), 4]: digit 1, direction 1, digit 2, direction 2; -1 where there is no second digit."""
    rows = [[c.digits[0], c.directions[0], *((c.digits[1], c.directions[1]) if len(c.digits) == 2 else (-1, -1))]
            for c in captions]  # fmt: skip
    return torch.tensor(rows, device=device)


def _paths(table: Tensor, slot: int, settings: Settings, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random (side [B], start centre x, y [B], displacement x, y [B]) of one slot, in pixels, inside its region."""
    num = len(table)
    u = torch.rand(num, 5, device=table.device, generator=generator)
    small, large = settings.digit_px
    side = small + (large - small) * u[:, 0]
    two = table[:, 2] >= 0
    left = torch.where(two, slot * settings.width / 2, 0.0)
    region_w = torch.where(two, settings.width / 2, float(settings.width))
    slack_x, slack_y = region_w - side, settings.height - side
    direction = table[:, 2 * slot + 1].clamp(min=0)
    step_x = torch.tensor(STEP_X, device=table.device)[direction]
    step_y = torch.tensor(STEP_Y, device=table.device)[direction]
    # The shorter axis leaves little room: there a clip travels most of its slack.
    slack = torch.where(step_x != 0, slack_x, slack_y)
    travel = torch.minimum(slack * (0.7 + 0.3 * u[:, 1]), settings.digit_px[1] * (0.6 + 0.5 * u[:, 2]))
    if settings.lattice_px:
        # The narrowest room is the half frame's width; one length for each room keeps the kinds of motion few.
        travel = torch.where(slack < settings.digit_px[0], (0.75 * slack).round(), settings.digit_px[0] - 2)
    move_x, move_y = step_x * travel, step_y * travel
    start_x = _start(slack_x - move_x.abs(), u[:, 3], settings.lattice_px)
    start_y = _start(slack_y - move_y.abs(), u[:, 4], settings.lattice_px)
    x = left + side / 2 + (-move_x).clamp(min=0) + start_x
    y = side / 2 + (-move_y).clamp(min=0) + start_y
    return side, x, y, move_x, move_y


def _start(room: Tensor, u: Tensor, lattice_px: float) -> Tensor:
    """A random start in [0, `room`] pixels, anywhere or on a grid; `u` is uniform in [0, 1)."""
    if not lattice_px:
        return u * room
    return lattice_px * (u * ((room / lattice_px).floor() + 1)).floor()


def _coverage(bank: DigitBank, table: Tensor, slot: int, times: Tensor, settings: Settings,
              generator: torch.Generator) -> Tensor:  # fmt: skip
    """Stroke coverage [B, F, H, W] of one slot at `times` [F] in [0, 1] of the way; empty where there is no digit."""
    digit = table[:, 2 * slot].clamp(min=0)
    pick = (torch.rand(len(table), device=table.device, generator=generator) * bank.count[digit]).long()
    patch = bank.patches_N1PP[bank.order[bank.start[digit] + pick]]
    side, x, y, move_x, move_y = _paths(table, slot, settings, generator)
    half = side * PATCH_MARGIN / 2
    centre_x = x[:, None] + move_x[:, None] * times
    centre_y = y[:, None] + move_y[:, None] * times
    pixels_x = torch.arange(settings.width, device=table.device) + 0.5
    pixels_y = torch.arange(settings.height, device=table.device) + 0.5
    grid_x = (pixels_x - centre_x[..., None]) / half[:, None, None]
    grid_y = (pixels_y - centre_y[..., None]) / half[:, None, None]
    num, frames = centre_x.shape
    size = (num, frames, settings.height, settings.width)
    grid = torch.stack([grid_x[:, :, None, :].expand(size), grid_y[..., None].expand(size)], dim=-1)
    grid = grid.reshape(num, frames * settings.height, settings.width, 2)
    alpha = F.grid_sample(patch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return alpha.reshape(size) * (table[:, 2 * slot] >= 0)[:, None, None, None]


@torch.no_grad()
def render(bank: DigitBank, table: Tensor, settings: Settings, *, generator: torch.Generator,
           times: Tensor | None = None) -> Tensor:  # fmt: skip
    """Renders clips [B, 3, F, H, W] in [-1, 1] for the rows of a `caption_table`.

    Each digit is a random image of its class that moves at constant velocity inside its region: the left or the right
    half, or the whole frame when it is alone. `times` [F] in [0, 1] defaults to `num_frames` equal steps.
    """
    if times is None:
        times = torch.linspace(0, 1, settings.num_frames, device=table.device)
    video = torch.tensor(BACKGROUND, device=table.device)[None, :, None, None, None]
    for slot, colour in enumerate((ORANGE, CYAN)):
        alpha = _coverage(bank, table, slot, times, settings, generator)[:, None]
        video = video * (1 - alpha) + torch.tensor(colour, device=table.device)[None, :, None, None, None] * alpha
    return video * 2 - 1
