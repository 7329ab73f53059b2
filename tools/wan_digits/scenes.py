"""What a clip shows and how a prompt says it: everything discrete stands in the prompt.

A scene is a row of 13 integers: for each of two digits its value, hand, colour, start cell, direction and speed; then the kind
of background. Any number of scenes is a table `[N, 13]`.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

COLOURS = {
    "red": (1.0, 0.15, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.15, 0.3, 1.0),
    "yellow": (1.0, 0.9, 0.1), "magenta": (1.0, 0.2, 0.9), "cyan": (0.1, 0.9, 1.0),
}  # fmt: skip
HANDS = ("A", "B", "C", "D", "E")
CELLS = tuple(f"{row}{column}" for row in "abcd" for column in range(1, 5))
DIRECTIONS = ("right", "downright", "down", "downleft", "left", "upleft", "up", "upright")
"""In eighths of a turn from the x axis, y downwards."""
SPEEDS = {"slowly": 0.2, "steadily": 0.45, "fast": 0.8}
"""Pixels a frame in a clip of 128 pixels' height."""
BACKGROUNDS = ("plain", "clouds", "grain", "bands")
SIZES = (10, len(HANDS), len(COLOURS), len(CELLS), len(DIRECTIONS), len(SPEEDS))
"""Choices of each of a digit's columns."""
NUM_COLUMNS = 2 * len(SIZES) + 1
SPLIT_SEED = 11


def random_scenes(num: int, generator: torch.Generator) -> Tensor:
    """`[num, 13]` on the generator's device."""
    sizes = torch.tensor([*SIZES, *SIZES, len(BACKGROUNDS)], device=generator.device)
    return (torch.rand(num, NUM_COLUMNS, generator=generator, device=generator.device) * sizes).long()


def prompt(scene: list[int]) -> str:
    """The sentence for one scene; all have the same number of words."""
    parts = []
    for slot in (scene[:6], scene[6:12]):
        digit, hand, colour, cell, direction, speed = slot
        parts.append(
            f"the digit {digit} by hand {HANDS[hand]} in {list(COLOURS)[colour]} from {CELLS[cell]} "
            f"moving {DIRECTIONS[direction]} {list(SPEEDS)[speed]}"
        )
    return f"{' and '.join(parts)} over {BACKGROUNDS[scene[12]]}"


def words() -> list[str]:
    """The vocabulary of the prompts, sorted."""
    fixed = ["the", "digit", "by", "hand", "in", "from", "moving", "and", "over"]
    return sorted({*fixed, *map(str, range(10)), *HANDS, *COLOURS, *CELLS, *DIRECTIONS, *SPEEDS, *BACKGROUNDS})


def prompt_scenes(num: int, part: str) -> list[list[int]]:
    """Scenes of the prompt file `part`; the two digits differ in colour."""
    rng = random.Random(f"{SPLIT_SEED} {part}")
    scenes: list[list[int]] = []
    while len(scenes) < num:
        scene = [rng.randrange(size) for size in (*SIZES, *SIZES, len(BACKGROUNDS))]
        if scene[2] != scene[8]:
            scenes.append(scene)
    return scenes
