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


def read_image(content: bytes) -> Image:
    """The image of a file, in RGB and upright.

    Raises:
        ValueError: it is none of `FORMATS`, damaged, or of more pixels than Pillow takes for harmless.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=FORMATS)
            image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # whatever a decoder raises of a damaged file
        raise ValueError(f"no image of the formats {', '.join(FORMATS)} that can be read: {error}") from error
