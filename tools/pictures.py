"""Pictures of predictions: label maps in colour, overlays, sheets of slices, framed with a caption and a legend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw, ImageFont

from tools.config import BadInput

Colour = tuple[int, int, int]

TEXT, WARNING, PAPER = (30, 30, 30), (190, 0, 0), (255, 255, 255)
MARGIN, FONT_SIZE = 12, 15
SMALLEST = 320
"""Smaller pictures are enlarged to about so many pixels a side."""
MOST_ENTRIES = 24
"""Lines of a legend."""


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return a font with Latin, Greek and Cyrillic letters; Pillow's own has those of English alone."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)  # text, before Pillow 11


def label_colours(names: Sequence[str], given: Sequence[Sequence[int]] | None = None) -> tuple[Colour, ...]:
    """Return a colour for every class.

    Args:
        names: of the classes; one named background is black.
        given: red, green and blue in 0..255 for each class; None for colours that differ.

    Raises:
        BadInput: for given colours that are none, or not one for each class.
    """
    if given is not None:
        colours: Any = tuple(tuple(colour) for colour in given if isinstance(colour, Sequence))
        values = [value for colour in colours for value in colour]
        whole = all(isinstance(value, int) and 0 <= value <= 255 for value in values)
        if len(colours) != len(names) or any(len(colour) != 3 for colour in colours) or not whole:
            raise BadInput(f"label_colors in config.json must be {len(names)} triples of integers from 0 to 255")
        return colours
    others = iter(_distinct(len(names)))
    return tuple((0, 0, 0) if name.lower() == "background" else next(others) for name in names)


def _distinct(count: int) -> list[Colour]:
    """Return colours that differ: first the strong half of matplotlib's tab20, then the pale one, then hues."""
    table: Any = getattr(matplotlib.colormaps["tab20"], "colors")  # noqa: B009
    colours = [*table[::2], *table[1::2]]
    hues = np.arange(max(0, count - len(colours))) * 0.618034 % 1  # the golden ratio keeps neighbours apart
    for hue in hues:
        colours.append(tuple(hsv_to_rgb((hue, 0.75, 0.85))))
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colours[:count]]


def indexed(labels: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """Return labels `(H, W)` as an 8-bit image whose pixel values are the classes, with the colours as its palette."""
    image = Image.fromarray(labels.astype(np.uint8))
    palette = [value for colour in colours for value in colour]
    image.putpalette(palette + [0] * (3 * 256 - len(palette)))  # of a shorter one Pillow would save fewer bits
    return image


def coloured(labels: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """Return labels `(H, W)` in their colours."""
    return Image.fromarray(np.asarray(colours, dtype=np.uint8)[labels])


def overlaid(
    image: Image.Image, labels: np.ndarray, colours: Sequence[Colour], clear: int | None = None, opacity: float = 0.5
) -> Image.Image:
    """Return an image with its labels `(H, W)` laid over it, all but the class `clear`."""
    opacities = np.full(labels.shape, round(255 * opacity), dtype=np.uint8)
    if clear is not None:
        opacities[labels == clear] = 0
    return Image.composite(coloured(labels, colours), image.convert("RGB"), Image.fromarray(opacities))


def contact_sheet(
    volume: np.ndarray,
    labels: np.ndarray,
    spacing: Sequence[float],
    colours: Sequence[Colour],
    clear: int | None = None,
    columns: int = 4,
    rows: int = 3,
) -> Image.Image:
    """Return slices across the last axis of a volume, each twice: as it is, and with its labels.

    Args:
        volume: grey values `(X, Y, Z)`; the picture has X to the right and Y upwards.
        labels: `(X, Y, Z)`; the slices are spread over where there are others than `clear`.
        spacing: mm per voxel along each axis.
        colours: of the classes.
        clear: class that is not drawn.
        columns, rows: how many pairs of pictures.
    """
    used = np.flatnonzero((labels != clear).any(axis=(0, 1)))
    first, last = (used[0], used[-1]) if len(used) else (0, labels.shape[2] - 1)
    lacking = max(0, columns * rows - (last - first + 1))  # few slices have labels: show some around them
    first, last = max(0, first - lacking // 2), min(labels.shape[2] - 1, last + lacking - lacking // 2)
    slices = np.unique(np.linspace(first, last, columns * rows).round().astype(int))
    low, high = np.percentile(volume, (0.5, 99.5))
    grey = (255 * np.clip((volume - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)
    mm = (volume.shape[0] * spacing[0], volume.shape[1] * spacing[1])
    width, height = (max(1, round(160 * side / max(mm))) for side in mm)
    columns, gap = min(columns, len(slices)), 6
    rows = -(-len(slices) // columns)
    sheet = Image.new("RGB", (columns * (2 * width + gap + 2) - gap, rows * (height + gap) - gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for k, z in enumerate(slices):
        tile = Image.fromarray(grey[:, ::-1, z].T).resize((width, height), Image.Resampling.BICUBIC)
        shown = Image.fromarray(labels[:, ::-1, z].T.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
        left, top = (k % columns) * (2 * width + gap + 2), k // columns * (height + gap)
        sheet.paste(tile, (left, top))
        sheet.paste(overlaid(tile, np.asarray(shown), colours, clear), (left + width + 2, top))
        draw.text((left + 3, top + 2), str(z), fill=(255, 220, 0), font=_font(11))
    return sheet


def framed(
    picture: Image.Image,
    title: str,
    legend: Sequence[tuple[Colour, str]],
    *,
    note: str = "",
    warning: str = "",
    smooth: bool = False,
) -> Image.Image:
    """Return a picture with a caption above and a legend to the right.

    Args:
        picture: small ones are enlarged by a whole factor.
        title: first line of the caption.
        legend: colour and text of each line; more than fit are counted.
        note: second line of the caption.
        warning: second line instead, in red, with a red frame round the picture.
        smooth: whether an enlarged picture is interpolated, or shows its pixels.
    """
    factor = max(1, SMALLEST // max(picture.size))
    if factor > 1:
        how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        picture = picture.resize((factor * picture.width, factor * picture.height), how)
    font, line = _font(FONT_SIZE), FONT_SIZE + 7
    entries = list(legend[:MOST_ENTRIES])
    more = [f"and {len(legend) - len(entries)} more"] if len(legend) > len(entries) else []
    panel = line + 8 + max((font.getlength(text) for text in [*(text for _, text in entries), *more]), default=0)
    inner = max(picture.width + MARGIN + panel, font.getlength(warning or note))
    top = MARGIN + 2 * line
    height = top + max(picture.height, line * (len(entries) + len(more))) + MARGIN
    sheet = Image.new("RGB", (round(inner) + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = _shortened(title, font, inner)
    draw.text((MARGIN, MARGIN // 2), title, fill=TEXT, font=font)
    draw.text((MARGIN, MARGIN // 2 + line), warning or note, fill=WARNING if warning else TEXT, font=font)
    sheet.paste(picture, (MARGIN, top))
    if warning:
        corners = (MARGIN - 4, top - 4, MARGIN + picture.width + 3, top + picture.height + 3)
        draw.rectangle(corners, outline=WARNING, width=4)
    left = 2 * MARGIN + picture.width
    for k, (colour, text) in enumerate(entries):
        y = top + k * line
        draw.rectangle((left, y, left + FONT_SIZE, y + FONT_SIZE), fill=colour, outline=TEXT)
        draw.text((left + line, y - 1), text, fill=TEXT, font=font)
    if more:
        draw.text((left + line, top + len(entries) * line), more[0], fill=TEXT, font=font)
    return sheet


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return the end of a text that is too wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text
