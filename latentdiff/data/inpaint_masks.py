"""What an inpainting sample hides: boxes and thick strokes at random, or all of the image.

The recipe of Stable Diffusion's inpainting model: a quarter of the samples is hidden whole, the
rest by masks like LaMa's (Suvorov et al. 2022). Sizes are shares of the image, so that they are the
same at any resolution.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

MAX_SHAPES = 4
BOX_SIDES = (0.15, 0.6)  # of the image's sides
STROKE_WIDTHS = (0.06, 0.2)  # of the shorter side
STROKE_POINTS = (2, 6)


def random_mask(rng: np.random.Generator, *, height: int, width: int, kind: str) -> np.ndarray:
    """Draw a mask, (height, width) uint8, 1 where the image is hidden.

    kind: "boxes", "strokes", or "random" for one of the two at a time.
    """
    if kind == "random":
        kind = ("boxes", "strokes")[int(rng.integers(2))]
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for _ in range(int(rng.integers(1, MAX_SHAPES + 1))):
        DRAWERS[kind](rng, draw, mask.size)
    return np.asarray(mask)


def whole_mask(height: int, width: int) -> np.ndarray:
    """Return the mask that hides all: (height, width) uint8."""
    return np.ones((height, width), np.uint8)


def _box(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    sides = [max(1, round(side * rng.uniform(*BOX_SIDES))) for side in size]
    left, top = (
        int(rng.integers(0, all_of - side + 1)) for all_of, side in zip(size, sides, strict=True)
    )
    draw.rectangle((left, top, left + sides[0] - 1, top + sides[1] - 1), fill=1)


def _stroke(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    num = int(rng.integers(STROKE_POINTS[0], STROKE_POINTS[1] + 1))
    line = max(1, round(min(size) * rng.uniform(*STROKE_WIDTHS)))
    points = [(float(x), float(y)) for x, y in rng.random((num, 2)) * size]
    draw.line(points, fill=1, width=line, joint="curve")
    for x, y in points:  # round ends
        draw.ellipse((x - line / 2, y - line / 2, x + line / 2, y + line / 2), fill=1)


Draw = Callable[[np.random.Generator, ImageDraw.ImageDraw, tuple[int, int]], None]
DRAWERS: dict[str, Draw] = {"boxes": _box, "strokes": _stroke}
