import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from reelquant.calibration.block_rounding import EXACT_DB
from tests.errors import raises
from workers.fidelity import fidelity

NO_LPIPS = "LPIPS needs weights that are not here"


@pytest.fixture
def reference() -> Tensor:
    return torch.rand(5, 23, 37, 3, generator=torch.Generator().manual_seed(1))


def test_a_copy_is_exact_and_finite(reference: Tensor) -> None:
    assert fidelity(reference, reference.clone(), NO_LPIPS) == {"psnr_db": EXACT_DB, "ssim": pytest.approx(1.0)}


def test_metrics_are_those_of_their_definitions(reference: Tensor) -> None:
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(2))
    video = (reference + 0.05 * noise).clamp(0, 1)
    found = fidelity(reference, video, NO_LPIPS)
    squared = (reference.double() - video.double()).square().mean()
    assert found["psnr_db"] == pytest.approx(-10 * math.log10(squared), abs=1e-9)
    one_by_one = [
        float(structural_similarity_index_measure(b[None], a[None], data_range=1.0))  # type: ignore[arg-type]
        for a, b in zip(reference.permute(0, 3, 1, 2), video.permute(0, 3, 1, 2), strict=True)
    ]
    assert found["ssim"] == pytest.approx(sum(one_by_one) / len(one_by_one), abs=1e-5)
    assert 0.5 < found["ssim"] < 0.99
    assert "lpips" not in found


def test_different_shapes_are_named(reference: Tensor) -> None:
    with raises(ValueError, (5, 23, 37, 3), (4, 23, 37, 3)):
        fidelity(reference, reference[:4], NO_LPIPS)
