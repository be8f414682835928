"""Edges of images as conditions: white lines on black, by the gradient of the colors.

The simplest of edge detectors: a blur, Sobel's gradient, of the channels the largest, a threshold.
Its lines are two to three pixels wide, so that a small VAE's latents keep them.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from latentdiff.atomic import atomic_file
from latentdiff.data.folder.companion_files import kind_of_name
from latentdiff.image_io import READABLE_EXTENSIONS, load_image

BLUR_PX = 1.0  # standard deviation of the blur before
THRESHOLD = 40.0  # of 255: how much a color changes from one pixel to the one after the next
SUFFIX = ".condition.png"


def edge_mask(image: Image.Image, *, threshold: float = THRESHOLD) -> np.ndarray:
    """Return where an image has edges: bool (H, W)."""
    soft = image.convert("RGB").filter(ImageFilter.GaussianBlur(BLUR_PX))
    pixels = np.pad(np.asarray(soft, np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = pixels[:-2] + 2 * pixels[1:-1] + pixels[2:]  # (H, W + 2, 3), smoothed downwards
    across = pixels[:, :-2] + 2 * pixels[:, 1:-1] + pixels[:, 2:]  # (H + 2, W, 3)
    gradient = np.hypot(down[:, 2:] - down[:, :-2], across[2:] - across[:-2]) / 4
    found: np.ndarray = gradient.max(axis=2) >= threshold
    return found


def draw_edges(image: Image.Image, *, threshold: float = THRESHOLD) -> Image.Image:
    """Return the edges of an image, white on black: RGB, of its size."""
    lines = edge_mask(image, threshold=threshold).astype(np.uint8) * 255
    return Image.fromarray(lines).convert("RGB")


def write_edges(root: str | Path, *, threshold: float = THRESHOLD) -> int:
    """Write NAME.condition.png next to each image of a folder that has none; return their number.

    FileNotFoundError for a folder without images, ImageError for a file that cannot be read.
    """
    images = [path for path in sorted(Path(root).rglob("*")) if _is_image(path)]
    if not images:
        raise FileNotFoundError(f"{root} holds no images, such as .png or .jpg")
    missing = [path for path in images if not path.with_suffix(SUFFIX).exists()]
    for path in missing:
        edges = draw_edges(load_image(path), threshold=threshold)
        with atomic_file(path.with_suffix(SUFFIX)) as temporary:
            edges.save(temporary, "PNG")
    return len(missing)


def _is_image(path: Path) -> bool:
    """Tell whether a file is an image, and no condition or mask of one."""
    return path.suffix.lower() in READABLE_EXTENSIONS and not kind_of_name(path.name)
