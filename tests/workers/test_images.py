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


def transparent(mode: str, alpha: int) -> bytes:
    """A white image with a black pixel of this alpha (0 or 255 of a palette's, or of a colour that is the transparent one)."""
    image, options = Image.new("RGBA", (3, 2), "white"), {}
    image.putpixel((0, 1), (0, 0, 0, alpha))
    if mode in ("P", "LA"):
        image = image.convert(mode)
    elif mode in ("RGB", "L", "1"):
        image = image.convert(mode)
        black: Any = (0, 0, 0) if mode == "RGB" else 0
        options = {"transparency": black if alpha < 255 else ((1, 2, 3) if mode == "RGB" else 9)}
    elif mode == "I;16":
        image = Image.new(mode, (3, 2), 40000)
        image.putpixel((0, 1), 300)
        options = {"transparency": 300 if alpha < 255 else 299}
    return saved(image, "PNG", **options)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_transparent_pixels_are_refused_and_opaque_ones_taken(mode: str) -> None:
    with raises(ValueError, "transparent"):
        read_image(transparent(mode, 0))
    opaque = transparent(mode, 255)
    assert Image.open(BytesIO(opaque)).has_transparency_data
    assert read_image(opaque).getpixel((0, 1)) == ((1,) * 3 if mode == "I;16" else (0,) * 3)


def test_transparent_webp() -> None:
    with raises(ValueError, "transparent"):
        read_image(saved(Image.new("RGBA", (8, 8), (200, 0, 0, 254)), "WEBP", lossless=True))
    assert read_image(saved(Image.new("RGBA", (8, 8), (200, 0, 0, 255)), "WEBP", lossless=True)).mode == "RGB"


FRAMES = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_several_frames_are_refused(format: str) -> None:
    with raises(ValueError, "3 frames"):
        read_image(saved(FRAMES[0], format, save_all=True, append_images=FRAMES[1:]))


def test_views_of_one_scene_are_an_image() -> None:
    """Cameras write them: JPEG with a smaller picture, or one of the other eye, behind the first."""
    content = saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:])
    assert Image.open(BytesIO(content)).format == "MPO"
    pixel = read_image(content).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 240


@pytest.mark.parametrize("more", [1, 3])
def test_too_many_pixels_are_named(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns of one pixel too many, and refuses twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with raises(ValueError, 64 * more + 8, 64, "pixels", "scale"):
        read_image(saved(Image.new("RGB", (8, 8 * more + 1)), "PNG"))


def test_a_message_has_no_object_of_pythons() -> None:
    with pytest.raises(ValueError, check=lambda error: "0x" not in str(error) and "PNG" in str(error)):
        read_image(b"no image")
