"""The canvas of a call: the size of its images in pixels, and the windows of a large one.

The size is by default that of the image to start from, of the condition, or of the training. Does
not answer for: the sizes that SDXL is told (sizes.py), nor how windows are placed and averaged
(diffusion/windows.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

from diffusers import UNet2DConditionModel

from latentdiff.diffusion.windows import Window, place_windows
from latentdiff.models.compatibility import sample_size_px, size_in_reach, unet_factor
from latentdiff.pipeline import checks
from latentdiff.pipeline.conditioning.image_condition import ConditionInputs
from latentdiff.pipeline.image_inputs import ImageInputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WindowInputs:
    """A caller's windows for a large canvas: the side in pixels, None for none, and the overlap."""

    window_size: int | None = None
    window_overlap: float = 0.5

    def checked(self, *, factor: int) -> WindowInputs:
        """Return them checked; ValueError for a bad one. factor: the VAE's."""
        overlap = checks.in_range("window_overlap", self.window_overlap, low=0.0, high=0.95)
        if self.window_size is not None:
            checks.side("window_size", self.window_size, multiple=factor)
        return WindowInputs(self.window_size, overlap)

    def place(self, size: tuple[int, int], *, factor: int) -> list[Window]:
        """Return the windows of a canvas (h, w) in latent pixels; none where one holds it all."""
        if self.window_size is None or self.window_size // factor >= max(size):
            return []
        windows = place_windows(size, self.window_size // factor, overlap=self.window_overlap)
        _warn_of_cost(len(windows), self.window_size)
        return windows

    def pass_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) in pixels that one pass of the U-Net sees of a canvas."""
        if self.window_size is None:
            return size
        return min(self.window_size, size[0]), min(self.window_size, size[1])

    def settings(self) -> dict[str, Any]:
        """Return the arguments that PNG files state."""
        return vars(self) if self.window_size is not None else {}


def canvas_size(
    asked: tuple[object, object],
    images: ImageInputs,
    condition: ConditionInputs,
    *,
    unet: UNet2DConditionModel,
    factor: int,
) -> tuple[int, int]:
    """Return (height, width) in pixels, by default the image's, the condition's or the trained.

    asked: the caller's (height, width), None for the default. factor: the VAE's. ValueError for
    one that is no multiple of the factor, too small or too large, by the argument it comes from.
    """
    own = images.size(multiple=factor) or condition.size(multiple=factor)
    if own is not None and None in asked:
        is_image = images.image is not None
        source = images if is_image else condition.images[0]
        _check_own(own, source, name="image" if is_image else "condition", factor=factor)
    default = own or trained_size_px(unet, factor=factor)
    return checks.size_px(*asked, default=default, multiple=factor)


def _check_own(own: tuple[int, int], source: ImageInputs, *, name: str, factor: int) -> None:
    """Raise ValueError for the size (height, width) that an image asks for, by the image's."""
    height, width = source.all_sizes()[0]
    given = f"{name} is {height} x {width} pixels (height x width)"
    if 0 in own:
        raise ValueError(
            f"{given}, less than {factor} on a side, this model's VAE factor; pass a larger one"
        )
    if own[0] * own[1] > checks.MAX_PIXELS:
        raise ValueError(
            f"{given}, for an image of {own[0]} x {own[1]}, more than {checks.MAX_PIXELS} pixels; "
            "pass a smaller one"
        )


def trained_size_px(unet: UNet2DConditionModel, *, factor: int) -> tuple[int, int]:
    """Return (height, width) in pixels that the U-Net was trained at; factor: the VAE's."""
    return sample_size_px(unet.config, factor=factor)


def warn_if_beyond_trained(
    size: tuple[int, int],
    unet: UNet2DConditionModel,
    *,
    windows: WindowInputs,
    is_upscaled: bool,
    factor: int,
) -> None:
    """Warn, once in a process, of passes far beyond the trained size; name one that is not.

    size: (height, width) in pixels of images that start from noise alone. is_upscaled: it is that
    of a condition times the factor, the VAE's.
    """
    seen, trained = windows.pass_size(size), trained_size_px(unet, factor=factor)
    better = size_in_reach(*seen, trained=trained, multiple=factor * unet_factor(unet.config))
    if better is None:
        return
    smaller = f"height={better[0]}, width={better[1]}, or "
    if is_upscaled:
        smaller = "a smaller condition, or "
    _warn_of_size(seen, trained, "" if windows.window_size is not None else smaller)


@cache
def _warn_of_cost(num_windows: int, side: int) -> None:
    logger.warning(
        "%d windows of %d px: each step takes %d passes of the U-Net",
        *(num_windows, side, num_windows),
    )


@cache
def _warn_of_size(size: tuple[int, int], trained: tuple[int, int], fix: str) -> None:
    logger.warning(
        "%d x %d pixels are %.1f times what this model was trained at (%d x %d), where subjects "
        "repeat and parts come apart; take %swindow_size=%d",
        *(*size, size[0] * size[1] / (trained[0] * trained[1]), *trained, fix, min(trained)),
    )
