"""Images of many kinds of files: what a pipeline is given is what the file shows."""

from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from tests.errors import raises
from workers.images import in_rgb, read_image


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_grey_of_16_bits_is_scaled() -> None:
    """Values 0, 257, 128 of them, 65535; `convert` would clip all but the first to white."""
    image = Image.new("I;16", (5, 1))
    for x, value in enumerate((0, 257, 128 * 257, 128 * 257 + 129, 65535)):
        image.putpixel((x, 0), value)
    content = saved(image, "PNG")
    assert Image.open(BytesIO(content)).mode == "I;16"
    read = read_image(content)
    assert read.mode == "RGB"
    assert [read.getpixel((x, 0)) for x in range(5)] == [(grey,) * 3 for grey in (0, 1, 128, 129, 255)]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_every_order_of_bytes(mode: str) -> None:
    grey = (2 * 257).to_bytes(2, "big" if mode == "I;16B" else "little")
    grey += (3 * 257).to_bytes(2, "big" if mode == "I;16B" else "little")
    assert in_rgb(Image.frombytes(mode, (2, 1), grey)).getpixel((1, 0)) == (3, 3, 3)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_colours_without_a_meaning_are_refused(mode: str) -> None:
    with raises(ValueError, mode, "RGB"):
        in_rgb(Image.new(mode, (2, 2)))
