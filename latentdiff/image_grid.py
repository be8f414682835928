"""Labelled grids of images, and pixels as floats, bytes and PIL images."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:  # a sheet's places are read without it
    from torch import Tensor

MARGIN = 8
FONT_SIZE = 12
MAX_LINES = 6
MIN_CELL = 128
BOXES = "boxes"
TILES = "tiles"  # text of a sheet's PNG file: JSON of where each image is, and its label
BACKGROUND, INK = (255, 255, 255), (32, 32, 32)


def draw_grid(images: Sequence[Image.Image], labels: Sequence[str], *, columns: int) -> Image.Image:
    """Lay out images in rows of `columns`, each with its wrapped label underneath.

    Images smaller than 128 pixels are enlarged by a whole factor without smoothing. The grid's
    info[BOXES] has each image's (left, top, right, bottom). Raises ValueError for no images, or
    where there is not one label an image.
    """
    if not images or len(images) != len(labels) or columns < 1:
        raise ValueError(
            f"a grid needs one label an image and at least one column, got {len(images)} "
            f"images, {len(labels)} labels, {columns} columns"
        )
    shown = [_enlarged(image.convert("RGB")) for image in images]
    width = max(image.width for image in shown)
    lines = [_wrap(label, width=width) for label in labels]
    height = max(image.height for image in shown) + MARGIN // 2
    height += _line_height() * max(len(wrapped) for wrapped in lines)
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    size = (MARGIN + columns * (width + MARGIN), MARGIN + rows * (height + MARGIN))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw, boxes = ImageDraw.Draw(sheet), []
    for index, (image, wrapped) in enumerate(zip(shown, lines, strict=True)):
        x = MARGIN + (index % columns) * (width + MARGIN)
        y = MARGIN + (index // columns) * (height + MARGIN)
        sheet.paste(image, (x, y))
        boxes.append((x, y, x + image.width, y + image.height))
        for number, line in enumerate(wrapped):
            top = y + image.height + MARGIN // 2 + number * _line_height()
            draw.text((x, top), line, fill=INK, font=_font())
    sheet.info[BOXES] = boxes
    return sheet


def from_uint8(images: Tensor) -> Tensor:
    """Turn uint8 into pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Turn pixels in [-1, 1] into uint8; others are clamped."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()


def to_pil(image: Tensor) -> Image.Image:
    """Turn (3, H, W), uint8 or pixels in [-1, 1], into an image."""
    import torch

    values = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-MIN_CELL // max(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrap(label: str, *, width: int) -> list[str]:
    """Break a label into lines that fit; words too long are broken, at most six lines are kept."""
    lines = [""]
    for word in _printable(label).split():
        line = f"{lines[-1]} {word}".strip()
        if _font().getlength(line) <= width:
            lines[-1] = line
            continue
        rest = word
        while rest:
            fitting = _fitting(rest, width=width)
            lines.append(rest[:fitting])
            rest = rest[fitting:]
    lines = [line for line in lines if line] or [""]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][:-1] + "…"]
    return lines


def _fitting(word: str, *, width: int) -> int:
    """Return how many of a word's first characters fit, at least one."""
    lengths = range(1, len(word) + 1)
    return max(1, bisect_right(lengths, width, key=lambda n: ceil(_font().getlength(word[:n]))))


def _printable(label: str) -> str:
    """Replace half surrogate pairs and control characters, which no font can show."""
    text = label.encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char.isprintable() else " " for char in text)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _line_height() -> int:
    return FONT_SIZE + 4
