"""Stage `recognizer`: trains `workers.recognition.DigitClassifier` on renderings of real digits alone.

Four fifths of the digits train it, the rest measures it. Renderings are augmented (size, shift, blur,
noise, intensity); "no digit" examples are noise, blank frames, blobs and two digits on top of each other.
"""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tools.digits.rendering import load_digit_images, smooth_patches
from tools.digits.settings import Settings
from workers.recognition import NO_DIGIT, DigitClassifier, crop_digits

FRAME_PX = 80
TEST_FRAC = 0.2


def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels), a fixed shuffle."""
    images, labels = load_digit_images()
    order = torch.tensor(random.Random(5).sample(range(len(images)), len(images)))
    cut = int(len(images) * TEST_FRAC)
    return images[order[cut:]], labels[order[cut:]], images[order[:cut]], labels[order[:cut]]


def place(patches: Tensor, digit_px: tuple[float, float], generator: torch.Generator) -> Tensor:
    """[N, 1, P, P] coverage -> [N, 80, 80] frames with each patch somewhere near the middle, randomly sized."""
    num = len(patches)
    u = torch.rand(num, 3, generator=generator)
    half = (digit_px[0] + (digit_px[1] - digit_px[0]) * u[:, 0]) * 10 / 8 / FRAME_PX
    theta = torch.zeros(num, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / half
    theta[:, :, 2] = (u[:, 1:] - 0.5) / half[:, None]
    grid = F.affine_grid(theta, [num, 1, FRAME_PX, FRAME_PX], align_corners=False)
    return F.grid_sample(patches, grid, align_corners=False)[:, 0]


def _blur(frames: Tensor, sigma: float) -> Tensor:
    x = torch.arange(-4, 5, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    frames = F.conv2d(frames[:, None], kernel[None, None, :, None], padding=(4, 0))
    return F.conv2d(frames, kernel[None, None, None, :], padding=(0, 4))[:, 0]


def augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur (one strength a batch), intensity, gamma, and noise."""
    num = len(frames)
    u = torch.rand(num, 3, 1, 1, generator=generator)
    blur = 0.3 + 1.3 * float(torch.rand((), generator=generator))
    frames = _blur(frames, blur) * (0.5 + 0.5 * u[:, 0])
    frames = frames.clamp(min=0) ** (0.7 + 0.7 * u[:, 1])
    return (frames + 0.1 * u[:, 2] * torch.randn(frames.shape, generator=generator)).clamp(0, 1)


def no_digit_frames(patches: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """[num, 80, 80]: white and smooth noise, blanks, blobs, and overlaid digits, in equal parts."""
    each = num // 4
    white = torch.rand(each, FRAME_PX, FRAME_PX, generator=generator)
    noise = torch.randn(each, FRAME_PX, FRAME_PX, generator=generator)
    smooth = _blur(noise, 0.7 + 2 * float(torch.rand((), generator=generator)))
    smooth = (smooth / smooth.flatten(1).std(1)[:, None, None] * 0.3).clamp(0, 1)
    coarse = torch.rand(each, 1, 5, 5, generator=generator)
    blobs = F.interpolate(F.pad((coarse - 0.4).clamp(min=0), (4, 4, 4, 4)), size=(FRAME_PX, FRAME_PX), mode="bicubic")
    picks = torch.randint(len(patches), (2, num - 3 * each), generator=generator)
    # A shift of a third of a digit keeps two overlaid digits from looking like one.
    pair = [place(patches[p], (28.0, 32.0), generator) for p in picks]
    overlaid = torch.maximum(pair[0], pair[1].roll(10, dims=2))
    return torch.cat([white, smooth, blobs[:, 0].clamp(0, 1), overlaid])


def crops_of(frames: Tensor) -> Tensor:
    """What the recognizer would cut from grayscale frames [N, 80, 80]: [N, 1, 32, 32]."""
    gray = (frames - frames.flatten(1).median(dim=1).values[:, None, None]).clamp(0, 1)
    return crop_digits(gray, 0.5 * FRAME_PX)


def train_recognizer(settings: Settings, folder: Path) -> float:
    """Trains, writes `folder`, and returns the accuracy on augmented renderings of the test digits."""
    torch.manual_seed(settings.seed + 8)
    generator = torch.Generator().manual_seed(settings.seed + 9)
    images, labels, test_images, test_labels = split_digits()
    patches = smooth_patches(images)
    width = 24
    model = DigitClassifier(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=settings.recognizer_steps + 1)
    for step in range(settings.recognizer_steps):
        picks = torch.randint(len(images), (112,), generator=generator)
        frames = torch.cat([place(patches[picks], (26.0, 34.0), generator), no_digit_frames(patches, 16, generator)])
        target = torch.cat([labels[picks], torch.full((16,), NO_DIGIT)])
        loss = F.cross_entropy(model(crops_of(augment(frames, generator))), target, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"recognizer step {step} loss {float(loss.detach()):.4f}", flush=True)
    accuracy, rejected = _test(model.eval(), smooth_patches(test_images), test_labels, generator)
    print(f"recognizer: {accuracy:.4f} of held-out digits read, {rejected:.4f} of no-digit frames rejected", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"width": width, "num_votes": 8, "min_probability": 0.5, "held_out_accuracy": round(accuracy, 4)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return accuracy


@torch.no_grad()
def _test(model: DigitClassifier, patches: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[float, float]:
    right = rejected = 0.0
    for _ in range(4):
        frames = augment(place(patches, (28.0, 32.0), generator), generator)
        right += float((model(crops_of(frames)).argmax(-1) == labels).float().mean()) / 4
        nothing = augment(no_digit_frames(patches, 120, generator), generator)
        rejected += float((model(crops_of(nothing)).argmax(-1) == NO_DIGIT).float().mean()) / 4
    return right, rejected
