"""How an image is made small for super-resolution: Pillow's bicubic and area filters, JPEG, blur.

Each takes (RGB image, size in pixels, generator) and gives the image at that size. The noise that
comes on top is that of models/unet/image_conditions.py.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

JPEG_QUALITIES = (30, 95)
BLUR_RADII = (0.2, 1.0)  # standard deviations, in pixels of the small image
Size = tuple[int, int]  # (width, height)
Degrade = Callable[[Image.Image, Size, np.random.Generator], Image.Image]


def bicubic(image: Image.Image, size: Size, rng: np.random.Generator) -> Image.Image:
    """Resize by the antialiased cubic filter."""
    return image.resize(size, Image.Resampling.BICUBIC)


def area(image: Image.Image, size: Size, rng: np.random.Generator) -> Image.Image:
    """Resize to the mean of the pixels that each new one covers."""
    return image.resize(size, Image.Resampling.BOX)


def jpeg(image: Image.Image, size: Size, rng: np.random.Generator) -> Image.Image:
    """Resize by the cubic filter and compress, at a random quality."""
    file = io.BytesIO()
    quality = int(rng.integers(JPEG_QUALITIES[0], JPEG_QUALITIES[1] + 1))
    bicubic(image, size, rng).save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def blur(image: Image.Image, size: Size, rng: np.random.Generator) -> Image.Image:
    """Blur by a Gaussian of a random width, then resize by the cubic filter."""
    radius = rng.uniform(*BLUR_RADII) * image.width / size[0]
    return bicubic(image.filter(ImageFilter.GaussianBlur(radius)), size, rng)


DEGRADATIONS: dict[str, Degrade] = {"bicubic": bicubic, "area": area, "jpeg": jpeg, "blur": blur}
