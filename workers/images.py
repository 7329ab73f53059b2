"""Images that a model is given beside a prompt: files' contents, which travel with their prompt. Imports no torch."""

from __future__ import annotations

import re
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
        ValueError: it is none of `FORMATS`, damaged, or of more pixels than Pillow takes for harmless; or RGB would show
            something else than the file: of several frames, of transparent pixels, of colours of other kinds.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    formats = f"is no image of the formats {', '.join(FORMATS)} that can be read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=FORMATS)
            num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: views of one scene
            image.load()
        upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        found = re.search(r"\d+", str(error))
        raise ValueError(
            f"has {found.group() if found else 'too many'} pixels, at most {Image.MAX_IMAGE_PIXELS} are taken: scale it down"
        ) from error
    except UnidentifiedImageError as error:  # which names an object of Python's
        raise ValueError(formats) from error
    except Exception as error:  # whatever a decoder raises of a damaged file
        raise ValueError(f"{formats}: {error}") from error
    if num_frames > 1:
        raise ValueError(f"has {num_frames} frames: save the one that is meant as an image of its own")
    if _is_transparent(upright):
        raise ValueError(
            "has transparent pixels, whose colours nothing shows: put it on a background, and save it without transparency"
        )
    return in_rgb(upright)


def _is_transparent(image: Image) -> bool:
    if not image.has_transparency_data:
        return False
    if image.mode in _GREY_16:  # one value is transparent, which `convert` would compare with 8 bits
        key = image.info["transparency"]
        return image.convert("I").point([int(value == key) for value in range(2**16)], "L").getextrema() != (0, 0)
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def in_rgb(image: Image) -> Image:
    """With 8 bits a channel; grey of 16 bits is scaled.

    Raises:
        ValueError: its values have no largest one (Pillow's modes `I` and `F`), or it is of another mode yet.
    """
    if image.mode in _GREY_16:  # which `convert` clips
        image = image.convert("I").point([(value + 128) // 257 for value in range(2**16)], "L")
    if image.mode not in _MODES:
        raise ValueError(f"has colours of Pillow's mode {image.mode}: save it in RGB with 8 bits a channel")
    if image.mode == "P":  # where opaque colours are listed, `convert` to RGB at once warns
        image = image.convert("RGBA")
    return image.convert("RGB")
