"""Previews of an image while it forms, which cost a small part of the time that its steps take.

The VAE decodes the predicted latents as often as that stays cheap. In between, a linear map from a
latent pixel to a color, fitted by least squares to what the VAE last decoded, stands in for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor

from latentdiff.image_grid import to_pil
from latentdiff.pipeline.callbacks import preview_images

MAX_SHARE = 0.15  # of the time since the first preview, that the VAE may take
MIN_INTERVAL_S = 0.5  # between a preview and one by the linear map


@dataclass
class LivePreview:
    """Previews of one call."""

    vae: AutoencoderKL | AutoencoderTiny
    _map: Tensor | None = None  # (C + 1, 3)
    _spent_s: float = 0.0
    _started: float = field(default_factory=time.perf_counter)
    _shown: float = 0.0

    @torch.no_grad()
    def images(self, z0: Tensor) -> list[Image.Image] | None:
        """Return small images of latents (B, C, h, w); None where the last ones may stay."""
        now = time.perf_counter()
        if self._map is None or self._spent_s <= MAX_SHARE * (now - self._started):
            images = preview_images(self.vae, z0)
            self._map = fit_linear_map(z0, images)
            self._shown = time.perf_counter()
            self._spent_s += self._shown - now
            return images
        if now - self._shown < MIN_INTERVAL_S:
            return None
        self._shown = now
        return linear_images(z0, self._map)


def fit_linear_map(z0: Tensor, images: list[Image.Image]) -> Tensor:
    """Return the (C + 1, 3) by which latents (B, C, h, w) and a 1 give the images' colors best."""
    size = z0.shape[-1], z0.shape[-2]
    small = [np.asarray(image.resize(size, Image.Resampling.BOX)) for image in images]
    colors = torch.from_numpy(np.stack(small)).double().flatten(0, 2) / 127.5 - 1  # (B h w, 3)
    return torch.linalg.lstsq(_rows(z0), colors, driver="gelsd").solution


def linear_images(z0: Tensor, linear_map: Tensor) -> list[Image.Image]:
    """Return images of a pixel a latent pixel."""
    colors = (_rows(z0) @ linear_map).unflatten(0, (len(z0), *z0.shape[-2:]))
    return [to_pil(one) for one in colors.movedim(-1, 1).float()]


def _rows(z0: Tensor) -> Tensor:
    """Return (B h w, C + 1): each latent pixel and a 1."""
    flat = z0.detach().double().cpu().movedim(1, -1).flatten(0, 2)
    return torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1)
