"""Stage `evaluate`: are the asked digits shown, and do they move as asked?"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import HunyuanVideoPipeline
from PIL import Image
from torch import Tensor

from tools.digits.captions import Caption
from tools.digits.rendering import STEP_X, STEP_Y
from tools.digits.settings import Settings
from workers.recognition import DigitRecognizer, brightness, centre_of_mass

MIN_TRAVEL_FRAC = 0.05
"""A digit counts as moving when its centre travels this part of the frame's height."""


@dataclass(frozen=True)
class Scores:
    """Fractions of the videos in which every digit is right."""

    recognized: float
    moved: float
    failures: tuple[str, ...]
    num_prompts: int


def motion_follows(video: Tensor, caption: Caption) -> bool:
    """Whether each digit of a video [F, H, W, 3] travels, and mostly along its direction.

    Displacement is that of the centre of mass from the first to the last frame.
    """
    gray = brightness(video)
    for part, direction in zip(gray.chunk(len(caption.digits), dim=2), caption.directions, strict=True):
        centre = centre_of_mass(part)
        move_x, move_y = (centre[-1] - centre[0]).tolist()
        along = move_x * STEP_X[direction] + move_y * STEP_Y[direction]
        across = abs(move_x * STEP_Y[direction]) + abs(move_y * STEP_X[direction])
        if along < MIN_TRAVEL_FRAC * video.shape[1] or across > along / 2:
            return False
    return True


def generate(pipe: HunyuanVideoPipeline, captions: list[Caption], settings: Settings) -> Tensor:
    """Videos [N, F, H, W, 3] in [0, 1] on the CPU, from the plain pipeline call; prompt i has seed i."""
    pipe.set_progress_bar_config(disable=True)
    videos = []
    for first in range(0, len(captions), settings.eval_batch):
        part = captions[first : first + settings.eval_batch]
        generators = [torch.Generator("cpu").manual_seed(first + i) for i in range(len(part))]
        frames = pipe(
            [str(c) for c in part],
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.eval_steps,
            max_sequence_length=32,
            generator=generators,
            output_type="pt",
        ).frames
        videos.append(frames.float().cpu().permute(0, 1, 3, 4, 2))
    return torch.cat(videos)


def score(videos: Tensor, captions: list[Caption], recognizer: DigitRecognizer) -> Scores:
    """Recognition and motion over videos [N, F, H, W, 3]."""
    read = [recognizer.read(v, len(c.digits)) for v, c in zip(videos, captions, strict=True)]
    moved = [motion_follows(v, c) for v, c in zip(videos, captions, strict=True)]
    failures = [f"{c}: read {r}" for r, c in zip(read, captions, strict=True) if r != c.digits]
    failures += [f"{c}: motion" for m, c in zip(moved, captions, strict=True) if not m]
    right = sum(r == c.digits for r, c in zip(read, captions, strict=True))
    return Scores(right / len(captions), sum(moved) / len(captions), tuple(failures), len(captions))


def report(scores: Scores) -> str:
    """One line with the rates, then a line for each failure."""
    values = asdict(scores)
    head = "evaluated {num_prompts} prompts: recognized {recognized:.4f}, motion right {moved:.4f}".format(**values)
    return "\n".join([head, *("  " + f for f in scores.failures)])


def save_picture(videos: Tensor, path: Path, *, num_columns: int = 8, zoom: int = 2) -> None:
    """One row for each video, `num_columns` frames spread over it, enlarged `zoom` times."""
    columns = torch.linspace(0, videos.shape[1] - 1, num_columns).round().long()
    rows = []
    for video in videos[:, columns]:
        rows.append(torch.cat([torch.nn.functional.pad(f, (0, 0, 0, 1, 0, 1), value=0.4) for f in video], dim=1))
    pixels = (torch.cat(rows) * 255).round().clamp(0, 255).byte().numpy()
    image = Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path, optimize=True)
