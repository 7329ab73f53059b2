"""LPIPS, where its weights are already on this machine. Nothing is downloaded, and nothing is faked."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor


class PerceptualDistance:
    """LPIPS with AlexNet features (Zhang et al. 2018), mean over frames."""

    def __init__(self) -> None:
        from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

        self._distance = learned_perceptual_image_patch_similarity

    @staticmethod
    def available() -> PerceptualDistance | str:
        """The metric, or in words why it cannot be had here."""
        try:
            import_module("torchvision")
        except (ImportError, RuntimeError) as error:
            return f"LPIPS needs torchvision: {error}"
        weights = Path(torch.hub.get_dir()) / "checkpoints"
        if not any(weights.glob("alexnet-owt-*.pth")):
            return f"LPIPS needs AlexNet's weights (alexnet-owt-*.pth) in {weights}"
        return PerceptualDistance()

    def __call__(self, reference: Tensor, video: Tensor) -> float:
        """Mean distance of two videos `[F, 3, H, W]` in [0, 1]; 0 is identical."""
        return float(self._distance(video, reference, net_type="alex", normalize=True))
