"""RGB images to a model's pixels: resize, crop, mirror, scale to [-1, 1].

Nothing here is random: training/inputs/dataset.py draws the crop and the flip. Resizing is Pillow's
own, antialiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from latentdiff.image_io import load_image

if TYPE_CHECKING:  # an image is cropped without it
    import torch

__all__ = ["Crop", "load_image", "resize_and_crop", "to_pixels", "uint8_to_pixels"]


@dataclass(frozen=True)
class Crop:
    """A cropped image; sizes are (height, width) and places (y, x) in pixels."""

    image: Image.Image
    original_size: tuple[int, int]
    top_left: tuple[int, int]  # in the resized image
    flip: bool


def resize_and_crop(
    image: Image.Image,
    *,
    height: int,
    width: int,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Crop:
    """Resize an image until it just covers (height, width), crop it, mirror if `flip`.

    crop: (y, x) in [0, 1], the crop's place in the room there is: (0.5, 0.5) is the centre, (0, 0)
    the top left. The flip comes last, so `top_left` is counted in the image before the flip.
    """
    if not all(0.0 <= place <= 1.0 for place in crop):
        raise ValueError(f"crop must be (y, x) in [0, 1], got {crop}")
    (resized_h, resized_w), (top, left) = resized_and_corner(
        (image.height, image.width), height=height, width=width, crop=crop
    )
    cropped = image
    if (resized_w, resized_h) != image.size:
        cropped = cropped.resize((resized_w, resized_h), resample)
    if (resized_w, resized_h) != (width, height):
        cropped = cropped.crop((left, top, left + width, top + height))
    if flip:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Crop(cropped, (image.height, image.width), (top, left), flip)


def resized_and_corner(
    original: tuple[int, int], *, height: int, width: int, crop: tuple[float, float]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size to resize an image to, and the top left corner of its crop there.

    original: (height, width); other arguments as in `resize_and_crop`, before its flip.
    """
    scale = max(height / original[0], width / original[1])
    resized_h = max(height, round(original[0] * scale))
    resized_w = max(width, round(original[1] * scale))
    top, left = round(crop[0] * (resized_h - height)), round(crop[1] * (resized_w - width))
    return (resized_h, resized_w), (top, left)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Turn an RGB image into pixels: (3, H, W) float32, 0 to 255 becoming -1 to 1."""
    import torch

    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}; use load_image")
    return uint8_to_pixels(torch.from_numpy(np.array(image, dtype=np.uint8))[None])[0]


def uint8_to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Turn (B, H, W, 3) uint8 into pixels: (B, 3, H, W) float32, 0 to 255 becoming -1 to 1."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
