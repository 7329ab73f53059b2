"""The recognizer reads real handwriting, and does not read what is not there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.errors import raises
from tools.digits.captions import Caption
from tools.digits.recognizer import split_digits
from tools.digits.rendering import caption_table, make_bank, render
from tools.digits.settings import Settings
from workers.recognition import DigitRecognizer, expected_digits

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = replace(Settings(), num_frames=3)


@pytest.fixture(scope="module")
def recognizer() -> DigitRecognizer:
    """The shipped weights."""
    return DigitRecognizer(ROOT / "assets" / "digit-recognizer")


def videos_of(captions: list[Caption]) -> torch.Tensor:
    """[N, F, H, W, 3] renderings of digits that the recognizer never saw."""
    bank = make_bank(*split_digits()[2:])
    clips = render(bank, caption_table(captions), SETTINGS, generator=torch.Generator().manual_seed(3))
    return ((clips + 1) / 2).permute(0, 2, 3, 4, 1)


def test_real_digits_are_read(recognizer: DigitRecognizer) -> None:
    captions = [Caption((d,), (d % 4,)) for d in range(10)] * 8
    captions += [Caption((d, (d + k) % 10), (k % 4, d % 4)) for d in range(10) for k in range(8)]
    videos = videos_of(captions)
    pairs = [
        (read, asked)
        for video, caption in zip(videos, captions, strict=True)
        for read, asked in zip(recognizer.read(video, len(caption.digits)), caption.digits, strict=True)
    ]
    right = sum(read == asked for read, asked in pairs) / len(pairs)
    assert right >= 0.98, f"{right:.4f} of {len(pairs)} real digits were read; 0.98 is asked"


def test_a_wrong_digit_is_not_recognized(recognizer: DigitRecognizer) -> None:
    captions = [Caption((d, (d + 3) % 10), (0, 3)) for d in range(10)]
    for video, caption in zip(videos_of(captions), captions, strict=True):
        first, second = caption.digits
        swapped = f"the digit {second} moving left and the digit {first} moving down"
        other = f"the digit {first} moving left and the digit {(second + 1) % 10} moving down"
        assert not recognizer.recognized(video, swapped)
        assert not recognizer.recognized(video, other)


@pytest.mark.parametrize("kind", ["black", "white", "static", "flicker", "gradient", "nan"])
def test_what_shows_no_digit_is_not_recognized(recognizer: DigitRecognizer, kind: str) -> None:
    shape = (SETTINGS.num_frames, SETTINGS.height, SETTINGS.width, 3)
    generator = torch.Generator().manual_seed(1)
    video = {
        "black": torch.zeros(shape),
        "white": torch.ones(shape),
        "static": torch.rand(shape[1:], generator=generator).expand(shape),
        "flicker": torch.rand(shape, generator=generator),
        "gradient": torch.linspace(0, 1, SETTINGS.width)[None, None, :, None].expand(shape),
        "nan": torch.full(shape, torch.nan),
    }[kind]
    assert recognizer.read(video, 1) == (-1,)
    assert recognizer.read(video, 2) == (-1, -1)
    assert not any(recognizer.recognized(video, f"the digit {d} moving left") for d in range(10))


def test_one_digit_in_the_wrong_half_leaves_the_other_unread(recognizer: DigitRecognizer) -> None:
    video = videos_of([Caption((5, 8), (0, 1))])[0]
    video[:, :, SETTINGS.width // 2 :] = video[0, 0, 0]
    assert recognizer.read(video, 2) == (5, -1)


@pytest.mark.parametrize(
    ("prompt", "digits"),
    [
        ("the digit 3 moving left", (3,)),
        ("the digit 3 moving left and the digit 7 moving down", (3, 7)),
        ("a cat walks on the grass", None),
        ("the digit 12 moving left", None),
        ("", None),
    ],
)
def test_expected_digits(prompt: str, digits: tuple[int, ...] | None) -> None:
    assert expected_digits(prompt) == digits


def test_errors_name_the_value(recognizer: DigitRecognizer) -> None:
    with raises(ValueError, (3, 8, 8)):
        recognizer.read(torch.zeros(3, 8, 8), 1)
    with raises(ValueError, "num_digits", 3):
        recognizer.read(torch.zeros(1, 8, 8, 3), 3)
    with raises(ValueError, "a cat"):
        recognizer.recognized(torch.zeros(1, 8, 8, 3), "a cat")
