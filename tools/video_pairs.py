"""A picture of a run's videos in pairs: above full precision, below the quantized model, of the same noise.

python tools/video_pairs.py runs/demo docs/video_pairs.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

GAP = 8
"""Pixels between pairs; inside one a quarter of it."""
EVERY = 4
"""Frames."""


def pair(evaluation: Path, method: str, prompt: int) -> NDArray[np.uint8]:
    """`[height, width, 3]`: the frames of one prompt, full precision above `method`."""
    films = [
        iio.imread(evaluation / f"{model}-prompt-{prompt:03d}.mp4", plugin="pyav")
        for model in ("full_precision", method)
    ]
    rows = [_apart(list(film[::EVERY]), GAP // 4, axis=1) for film in films]
    return _apart(rows, GAP // 4, axis=0)


def picture(evaluation: Path, method: str, prompts: int) -> NDArray[np.uint8]:
    """`[height, width, 3]`: pairs of the first `prompts` prompts, an even number, two side by side."""
    pairs = [pair(evaluation, method, prompt) for prompt in range(prompts)]
    return _apart([_apart(pairs[i : i + 2], GAP, axis=1) for i in range(0, prompts, 2)], GAP, axis=0)


def _apart(parts: list[NDArray[np.uint8]], gap: int, *, axis: int) -> NDArray[np.uint8]:
    """The parts in a row (axis 1) or a column (axis 0), white between them."""
    shape = list(parts[0].shape)
    shape[axis] = gap
    white = np.full(shape, 255, np.uint8)
    spaced = [piece for part in parts for piece in (white, part)][1:]
    return np.concatenate(spaced, axis=axis)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", default="reelquant")
    parser.add_argument("--prompts", type=int, default=4)
    given = parser.parse_args()
    iio.imwrite(given.output, picture(given.run / "evaluation", given.method, given.prompts))


if __name__ == "__main__":
    main()
