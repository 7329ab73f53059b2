"""Reads which digits a video shows, and compares them with what its prompt asked for.

The classifier saw real handwriting only (assets/README.md), never a generated or decoded video, so that it judges
them independently. An eleventh class, "no digit", stands for blank, noisy and smeared pictures.

A crop is cut around the centre of mass of the brightness: of the whole frame when one digit is asked, of each half
when two are.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

NO_DIGIT = 10
UNREADABLE = -1
CROP_PX = 32
"""Side of a crop as the classifier sees it."""
CROP_FRAC = 0.5
"""Side of a crop over the height of a frame."""
MIN_BRIGHTNESS = 0.15
"""Brightness, above the background's, under which a region is blank."""
PROMPT = re.compile(r"\bdigit (\d)\b")


class DigitClassifier(nn.Module):
    """Logits over ten digits and "no digit" from grayscale crops [N, 1, 32, 32] in [0, 1]."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (1, width, 2 * width, 4 * width)
        for num_in, num_out in pairwise(channels):
            layers += [nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(channels[-1] * (CROP_PX // 8) ** 2, NO_DIGIT + 1))

    def forward(self, crops: Tensor) -> Tensor:
        """[N, 1, 32, 32] -> [N, 11]."""
        logits: Tensor = self.head(self.features(crops).flatten(1))
        return logits


def brightness(video: Tensor) -> Tensor:
    """[F, H, W, 3] in [0, 1] -> [F, H, W]: the brightest channel, above the frame's median, in [0, 1]."""
    bright = video.float().amax(dim=-1)
    return (bright - bright.flatten(1).median(dim=1).values[:, None, None]).clamp(0, 1)


def centre_of_mass(gray: Tensor) -> Tensor:
    """[F, H, W] -> [F, 2]: (x, y) in pixels of the pixels over a third of the frame's maximum."""
    peak = gray.flatten(1).amax(dim=1)[:, None, None]
    mass = torch.where(gray > peak / 3, gray, torch.zeros_like(gray))
    total = mass.sum(dim=(1, 2)).clamp(min=1e-6)
    x = torch.arange(gray.shape[2], device=gray.device) + 0.5
    y = torch.arange(gray.shape[1], device=gray.device) + 0.5
    return torch.stack([(mass.sum(1) * x).sum(1) / total, (mass.sum(2) * y).sum(1) / total], dim=-1)


def crop_digits(gray: Tensor, side_px: float) -> Tensor:
    """[F, H, W] -> [F, 1, 32, 32]: squares of `side_px` around the centre of mass, each scaled to a maximum of 1."""
    num, height, width = gray.shape
    centre = centre_of_mass(gray)
    offsets = (torch.arange(CROP_PX, device=gray.device) + 0.5) / CROP_PX * side_px - side_px / 2
    x = (centre[:, 0, None] + offsets) * 2 / width - 1
    y = (centre[:, 1, None] + offsets) * 2 / height - 1
    size = (num, CROP_PX, CROP_PX)
    grid = torch.stack([x[:, None, :].expand(size), y[:, :, None].expand(size)], dim=-1)
    crops = F.grid_sample(gray[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return crops / crops.flatten(1).amax(dim=1).clamp(min=1e-3)[:, None, None, None]


def expected_digits(prompt: str) -> tuple[int, ...] | None:
    """The digits a prompt names, in order; None when it names none."""
    found = tuple(int(d) for d in PROMPT.findall(prompt))
    return found or None


class DigitRecognizer:
    """Reads one digit, or one in each half, from a video."""

    FILES = ("config.json", "model.safetensors")
    """Settings and weights, of its folder."""

    def __init__(self, folder: Path) -> None:
        settings, weights = (Path(folder) / name for name in self.FILES)
        config = json.loads(settings.read_text())
        self.model = DigitClassifier(config["width"])
        self.model.load_state_dict(load_file(weights))
        self.model.eval()
        self.num_votes: int = config["num_votes"]
        self.min_probability: float = config["min_probability"]

    def read(self, video: Tensor, num_digits: int) -> tuple[int, ...]:
        """Digits from left to right in a video [F, H, W, 3] in [0, 1]; -1 where none can be read.

        Probabilities of `num_votes` frames spread over the video are averaged. With two digits, each half of the
        width is read for itself. Raises ValueError for other shapes and numbers of digits.
        """
        if video.ndim != 4 or video.shape[-1] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}: [frames, height, width, 3] in [0, 1] is expected")
        if num_digits not in (1, 2):
            raise ValueError(f"num_digits is {num_digits}: a video shows 1 or 2 digits")
        frames = torch.linspace(0, len(video) - 1, min(self.num_votes, len(video))).round().long()
        gray = brightness(video.detach().cpu()[frames])
        return tuple(self._read_region(part) for part in gray.chunk(num_digits, dim=2))

    @torch.no_grad()
    def _read_region(self, gray: Tensor) -> int:
        if not torch.isfinite(gray).all() or gray.flatten(1).amax(dim=1).mean() < MIN_BRIGHTNESS:
            return UNREADABLE
        crops = crop_digits(gray, CROP_FRAC * gray.shape[1])
        probabilities = self.model(crops).softmax(dim=-1).mean(dim=0)
        best = int(probabilities.argmax())
        if best == NO_DIGIT or float(probabilities[best]) < self.min_probability:
            return UNREADABLE
        return best

    def recognized(self, video: Tensor, prompt: str) -> bool:
        """Whether every digit that `prompt` names is read in its place; ValueError when it names none."""
        expected = expected_digits(prompt)
        if expected is None:
            raise ValueError(f"the prompt names no digit: {prompt!r} (say 'the digit 3 moving left', for example)")
        return self.read(video, len(expected)) == expected
