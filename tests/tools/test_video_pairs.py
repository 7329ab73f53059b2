"""The README's picture of video pairs."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np

from tools.video_pairs import EVERY, GAP, picture


def test_pairs_stand_two_side_by_side_full_precision_above(tmp_path: Path) -> None:
    height, width, num_frames = 32, 48, 9
    for prompt in range(4):
        for model, level in (("full_precision", 40 + 20 * prompt), ("gptq", 140 + 20 * prompt)):
            film = np.full((num_frames, height, width, 3), level, np.uint8)
            iio.imwrite(tmp_path / f"{model}-prompt-{prompt:03d}.mp4", film, fps=8, codec="libx264", plugin="pyav")
    found = picture(tmp_path, "gptq", 4)
    columns = len(range(0, num_frames, EVERY))
    one = columns * width + (columns - 1) * (GAP // 4)
    tall = 2 * height + GAP // 4
    assert found.shape == (2 * tall + GAP, 2 * one + GAP, 3)
    levels = [found[y, x, 0] for y in (5, tall - 5, tall + GAP + 5, -5) for x in (5, one + GAP + 5)]
    expected = [40, 60, 140, 160, 80, 100, 180, 200]
    assert np.abs(np.array(levels, float) - expected).max() <= 4  # of a lossy codec
    assert (found[5, one + 1] == 255).all()
