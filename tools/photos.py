"""Photographs to predict: files of every kind as 8-bit grey or colour, the way up that they were taken."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tools.config import BadInput

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def read_image(path: Path, in_chans: int) -> Image.Image:
    """Return an image in grey (`in_chans` 1) or colour (3), 8 bits a channel.

    16-bit grey values keep their upper 8 bits, float ones are taken to be in 0..1, what is transparent is laid on
    white, the orientation in EXIF is applied, and of several frames the first is taken.

    Raises:
        BadInput: if it cannot be read, or is not of this kind.
    """
    if in_chans not in (1, 3):
        raise BadInput(f"{path}: an image file gives 1 or 3 channels, the model takes {in_chans}")
    if not path.is_file():
        raise BadInput(f"no image {path}")
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise BadInput(f"cannot read {path}: it is no image") from None
    # What Pillow raises for a damaged file depends on where it is damaged.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"cannot read image {path}: {reason}") from None
    return _opaque(_eight_bits(image, path)).convert("L" if in_chans == 1 else "RGB")


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadInput(f"{path} has values that are NaN or infinite")
    if image.mode == "F":
        values, rule = values * 255, "float values must be in 0..1"
    else:
        values, rule = np.floor(values / 256), "whole numbers must be in 0..65535"
    if values.min() < 0 or values.max() > 255:
        raise BadInput(f"{path}: {rule}")
    return Image.fromarray(np.round(values).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    coloured = image.convert("RGBA")
    white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, coloured).convert("RGB")
