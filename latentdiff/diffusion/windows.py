"""Overlapping windows of a large canvas: MultiDiffusion (Bar-Tal et al. 2023, Eq. 5).

A network that was trained at one size predicts window by window, and where windows overlap their
predictions are averaged; so a canvas of any size is denoised as one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-6  # of a product of floats: 40 x (1 - 0.9) is 4


@dataclass(frozen=True)
class Window:
    """A part of a canvas (..., h, w), in latent pixels."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, x: Tensor, *, factor: int = 1) -> Tensor:
        """Return this part of x (..., h * factor, w * factor)."""
        top, left = self.top * factor, self.left * factor
        return x[..., top : top + self.height * factor, left : left + self.width * factor]


def place_windows(size: tuple[int, int], side: int, *, overlap: float) -> list[Window]:
    """Return square windows that cover a canvas of a size (h, w), row by row.

    side: of a window; it is cut where the canvas is smaller. overlap: the least share in [0, 1) of
    a window that the next one covers too. They are evenly spaced, the first and last at the edges.
    """
    height, width = (min(side, length) for length in size)
    tops, lefts = (_starts(length, side, overlap) for length in size)
    return [Window(top, left, height, width) for top in tops for left in lefts]


def average_windows(
    predict: Callable[[Window], Tensor], windows: list[Window], *, size: tuple[int, int]
) -> Tensor:
    """Return the mean of the predictions (B, C, height, width) of all windows: (B, C, h, w).

    A window counts less the nearer a place is to its edge, where it knows least of what lies beyond
    (the weights W of the paper; Jiménez 2023 takes Gaussian ones): so edges leave no seams.
    """
    total = sums = weights = torch.zeros(())
    for window in windows:
        part = predict(window)
        if not total.ndim:  # made where the parts are: a copy would make the host wait
            rows, columns = (_tent(n, part.device) for n in (window.height, window.width))
            weights = torch.outer(rows, columns).to(part)
            total, sums = part.new_zeros(*part.shape[:2], *size), part.new_zeros(size)
        window.crop(total).add_(part * weights)
        window.crop(sums).add_(weights)
    return total / sums


def _tent(length: int, device: torch.device) -> Tensor:
    """Return weights that rise from the edges to the middle, at most 1: (length,)."""
    places = torch.arange(length, device=device) + 0.5
    return torch.minimum(places, length - places) / (length / 2)


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    stride = max(1, int(side * (1 - overlap) + ROUNDING))
    num = -(-(length - side) // stride)
    return [round(k * (length - side) / num) for k in range(num + 1)]
