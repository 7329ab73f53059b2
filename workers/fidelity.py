"""How far a video lies from the full-precision video of the same noise."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.calibration.block_rounding import EXACT_DB
from reelquant.metrics import psnr_db
from workers.perceptual import PerceptualDistance


def fidelity(reference: Tensor, video: Tensor, perceptual: PerceptualDistance | str) -> dict[str, float]:
    """`psnr_db` over all frames (at most `EXACT_DB`), mean `ssim` of the frames, and `lpips` where it can be had.

    Args:
        reference: `[F, H, W, 3]` in [0, 1], float.
        video: the same shape.
        perceptual: what `PerceptualDistance.available()` says.

    Raises:
        ValueError: different shapes.
    """
    # A tenth of what a process takes to start, where most measure no video: it brings matplotlib.
    from torchmetrics.functional.image import structural_similarity_index_measure

    # PSNR first: it is what names both shapes when they differ.
    measured = {"psnr_db": min(psnr_db(reference, video), EXACT_DB)}
    frames = reference.permute(0, 3, 1, 2), video.permute(0, 3, 1, 2)
    ssim = structural_similarity_index_measure(frames[1], frames[0], data_range=1.0)
    measured["ssim"] = float(torch.as_tensor(ssim))
    if isinstance(perceptual, PerceptualDistance):
        measured["lpips"] = perceptual(*frames)
    return measured
