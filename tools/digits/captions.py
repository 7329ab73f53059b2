"""The prompts of the digits model: what can be said, and which combinations training never sees."""

import random
from dataclasses import dataclass
from pathlib import Path

DIRECTIONS = ("left", "right", "up", "down")
NUM_DIGITS = 10
HELD_OUT_FRAC = 0.1
SPLIT_SEED = 7


@dataclass(frozen=True)
class Caption:
    """One or two digits with their directions; the first named digit is in the left half of a two-digit video."""

    digits: tuple[int, ...]
    directions: tuple[int, ...]
    """Indices into `DIRECTIONS`, one for each digit."""

    def __str__(self) -> str:
        parts = [f"the digit {d} moving {DIRECTIONS[m]}" for d, m in zip(self.digits, self.directions, strict=True)]
        return " and ".join(parts)


def all_captions(num_digits: int) -> list[Caption]:
    """All 40 one-digit or all 1600 two-digit captions, in a fixed order."""
    single = [Caption((d,), (m,)) for d in range(NUM_DIGITS) for m in range(len(DIRECTIONS))]
    if num_digits == 1:
        return single
    return [Caption(a.digits + b.digits, a.directions + b.directions) for a in single for b in single]


def split_captions(num_digits: int) -> tuple[list[Caption], list[Caption]]:
    """(training, held out): a seeded tenth of the combinations is held out."""
    captions = all_captions(num_digits)
    order = random.Random(SPLIT_SEED + num_digits).sample(range(len(captions)), len(captions))
    cut = int(len(captions) * HELD_OUT_FRAC)
    held_out = set(order[:cut])
    return [c for i, c in enumerate(captions) if i not in held_out], [captions[i] for i in sorted(held_out)]


def prompt_sets() -> tuple[list[Caption], list[Caption]]:
    """(24 training captions for calibration, 64 held-out captions for evaluation), both mixed and shuffled."""
    rng = random.Random(SPLIT_SEED)
    train_one, held_one = split_captions(1)
    train_two, held_two = split_captions(2)
    calibration = rng.sample(train_one, 6) + rng.sample(train_two, 18)
    held_out = held_one + rng.sample(held_two, 64 - len(held_one))
    rng.shuffle(calibration)
    rng.shuffle(held_out)
    return calibration, held_out


def write_prompts(folder: Path) -> None:
    """Writes `digits_calibration.txt` and `digits_held_out.txt`, one prompt a line."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = prompt_sets()
    (folder / "digits_calibration.txt").write_text("".join(f"{c}\n" for c in calibration))
    (folder / "digits_held_out.txt").write_text("".join(f"{c}\n" for c in held_out))
