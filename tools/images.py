"""Image files of every kind as 8-bit grey or colour, the way up that they were taken, and masks of class numbers."""

import io
import struct
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from tools.config import BadInput, first_line

Source = Path | tuple[str, bytes]
"""A file, or the name and the content of one that lies in an archive."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

# What Pillow raises for a damaged file depends on where it is damaged.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, OverflowError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by the numbers of EXIF (orientation, tag 0x0112)."""
_STRETCH = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies grey values of few bits by, to fill 8 of them."""


def left_out_line(folder: Path, files: Collection[Path]) -> str:
    """Return a warning of files of a folder that are of no kind that is read there."""
    kinds = Counter(file.suffix.lower() or file.name for file in sorted(files))
    listed, more = ", ".join(kind for kind, _ in kinds.most_common(4)), ", ..." if len(kinds) > 4 else ""
    return f"warning: {folder}: {len(files)} files of other kinds are left out ({listed}{more})"


def name_of(source: Source) -> str:
    return str(source if isinstance(source, Path) else source[0])


def _open(source: Source) -> tuple[Image.Image, str]:
    """Return the first frame of a file, turned as its EXIF says, and of a PNG how its pixels are packed, else ""."""
    if isinstance(source, Path) and not source.is_file():
        raise BadInput(f"no image {source}")
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source[1])) as file:
            packing = str(file.tile[0][3]) if file.format == "PNG" and file.tile else ""  # gone once it is loaded
            file.load()
            # Pillow's exif_transpose would also write the EXIF anew, and fail where another of its tags is odd.
            turn = _TURNS.get(_orientation(file))
            return file.copy() if turn is None else file.transpose(turn), packing
    except UnidentifiedImageError:
        raise BadInput(f"cannot read image {name_of(source)}: it is not an image") from None
    except _DAMAGED as error:
        reason = first_line(error)
        raise BadInput(f"cannot read image {name_of(source)}: {reason}") from None


def exif_orientation(source: Source) -> int:
    """Return how a file is to be turned, by the numbers of EXIF; 1 for not at all."""
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source[1])) as file:
        return _orientation(file)


def _orientation(file: Image.Image) -> int:
    try:
        return int(file.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGED:  # the EXIF, not the pixels
        return 1


def read_picture(source: Source, in_chans: int) -> Image.Image:
    """Return an image in grey (`in_chans` 1) or colour (3), 8 bits a channel.

    16-bit grey values keep their upper 8 bits, float ones are taken to be in 0..1, what is transparent is laid on
    white, the orientation in EXIF is applied, and of several frames the first is taken.

    Raises:
        BadInput: if it cannot be read, or is not of this kind.
    """
    if in_chans not in (1, 3):
        raise BadInput(f"image files have 1 or 3 channels, the model takes {in_chans} (model.kwargs.in_chans)")
    image = _eight_bits(_open(source)[0], name_of(source))
    try:
        return _opaque(image).convert("L" if in_chans == 1 else "RGB")
    except ValueError:
        raise BadInput(f"cannot read image {name_of(source)}: mode {image.mode} is neither grey nor RGB") from None


def read_image(source: Source, in_chans: int) -> Tensor:
    """Return what `read_picture` reads as a tensor `(in_chans, H, W)` uint8."""
    pixels = np.asarray(read_picture(source, in_chans))
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], in_chans).permute(2, 0, 1).contiguous()


def _is_wide(image: Image.Image) -> bool:
    """Whether pixels are whole numbers of more than 8 bits, of which PIL would clip all that is above 255."""
    return image.mode.startswith("I")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    if not _is_wide(image) and image.mode != "F":
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadInput(f"{name} has NaN or infinite values")
    if image.mode == "F":
        values, rule = values * 255, "float values must be in 0..1"
    else:
        values, rule = np.floor(values / 256), "whole numbers must be in 0..65535"
    if values.min() < 0 or values.max() > 255:
        raise BadInput(f"{name}: {rule}")
    return Image.fromarray(np.round(values).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    coloured = image.convert("RGBA")
    white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, coloured).convert("RGB")


def read_mask(source: Source, table: np.ndarray) -> Tensor:
    """Return a mask `(H, W)` uint8 of one channel, or of palette indices, its values replaced by a table's.

    Args:
        source: the file.
        table: `(256,)`, the label of each value; negative where a value must not occur.

    Raises:
        BadInput: if it cannot be read, has colours for labels, or a value that must not occur.
    """
    image, packing = _open(source)
    if image.mode not in ("L", "P", "1") and not _is_wide(image):
        raise BadInput(f"mask {name_of(source)} has mode {image.mode}; expected one channel of class numbers")
    values = np.asarray(image).astype(np.int64) // _STRETCH.get(packing, 1)
    bad = values[(values < 0) | (values > 255) | (table[values.clip(0, 255)] < 0)]
    if bad.size:
        hint = " (a mask of 1 bit has 0 and 1)" if image.mode == "1" else ""
        raise BadInput(f"mask {name_of(source)} has the label value {bad[0]}, which is not a class{hint}")
    return torch.from_numpy(table[values].astype(np.uint8))
