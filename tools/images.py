"""Image and mask files of any kind of pixel as tensors of bytes."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tools.config import BadInput

Source = Path | tuple[str, bytes]
"""A file, or the name and the content of one that lies in an archive."""

_WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def name_of(source: Source) -> str:
    return str(source if isinstance(source, Path) else source[0])


def _open(source: Source) -> Image.Image:
    try:
        with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source[1]) as file:
            image = Image.open(file)
            image.load()
            return image
    except FileNotFoundError:
        raise BadInput(f"no image {name_of(source)}") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read image {name_of(source)}: {error}") from None


def read_image(source: Source, in_chans: int) -> Tensor:
    """Return an image `(in_chans, H, W)` uint8; grey becomes colour or the other way, 16 bits become 8.

    Raises:
        BadInput: if it cannot be read, or a model takes neither 1 nor 3 channels.
    """
    if in_chans not in (1, 3):
        raise BadInput(f"image files have 1 or 3 channels, the model takes {in_chans} (model.kwargs.in_chans)")
    image = _open(source)
    if image.mode in _WIDE:  # PIL would clip all that is above 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise BadInput(f"image {name_of(source)} has fractions for pixels; save it with 8 or 16 bits")
    pixels = np.asarray(image.convert("L" if in_chans == 1 else "RGB"))
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], in_chans).permute(2, 0, 1).contiguous()


def read_mask(source: Source, table: np.ndarray) -> Tensor:
    """Return a mask `(H, W)` uint8 of one channel, or of palette indices, its values replaced by a table's.

    Args:
        source: the file.
        table: `(256,)`, the label of each value; negative where a value must not occur.

    Raises:
        BadInput: if it cannot be read, has colours for labels, or a value that must not occur.
    """
    image = _open(source)
    if image.mode not in ("L", "P", "1", *_WIDE):
        raise BadInput(f"mask {name_of(source)} has the pixels {image.mode}; expected one channel of class numbers")
    values = np.asarray(image).astype(np.int64)
    bad = values[(values < 0) | (values > 255) | (table[values.clip(0, 255)] < 0)]
    if bad.size:
        raise BadInput(f"mask {name_of(source)} has the label value {bad[0]}, which is no class")
    return torch.from_numpy(table[values].astype(np.uint8))
