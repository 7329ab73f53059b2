"""Images that a model is given beside a prompt: files' contents, which travel with their prompt. Imports no torch."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP")
MOST_BYTES = 32 * 2**20
"""Of an image's file: it travels in a message."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's, of 8 bits a channel."""
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's, of one channel of 16 bits."""


def read_image(content: bytes) -> Image:
    """The image of a file, in RGB and upright.

    Raises:
        ValueError: it is none of `FORMATS`, damaged, of more pixels than Pillow takes for harmless, or of other colours.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=FORMATS)
            image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a decoder raises of a damaged file
        raise ValueError(f"is no image of the formats {', '.join(FORMATS)} that can be read: {error}") from error
    return in_rgb(upright)


def in_rgb(image: Image) -> Image:
    """With 8 bits a channel; grey of 16 bits is scaled.

    Raises:
        ValueError: its values have no largest one (Pillow's modes `I` and `F`), or it is of another mode yet.
    """
    if image.mode in _GREY_16:  # which `convert` clips
        image = image.convert("I").point([(value + 128) // 257 for value in range(2**16)], "L")
    if image.mode not in _MODES:
        raise ValueError(f"has colours of Pillow's mode {image.mode}: save it in RGB with 8 bits a channel")
    return image.convert("RGB")
