"""Small pictures of a chain while it runs, cheap enough to make at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor

from latentdiff.latents import LatentCodec

PREVIEW_CELLS = 32


@dataclass
class Preview:
    """A step callback that shows the predicted picture; pass it as callback_on_step_end.

    show(i, pictures) is called after every `every_steps` steps. vae: one of the same latent space
    as the pipeline's; a small one such as TAESD is many times faster. Latents of more than
    max_cells along a side are shrunk before decoding.
    """

    vae: AutoencoderKL | AutoencoderTiny
    show: Callable[[int, list[Image.Image]], None]
    every_steps: int = 1
    max_cells: int = PREVIEW_CELLS
    tensor_inputs: tuple[str, ...] = ("predicted_z0",)

    def __call__(self, pipe: Any, i: int, t: Tensor, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Decode and show one step."""
        if (i + 1) % self.every_steps == 0:
            self.show(i, preview(self.vae, tensors["predicted_z0"], max_cells=self.max_cells))
        return {}


@torch.no_grad()
def preview(
    vae: AutoencoderKL | AutoencoderTiny, z0: Tensor, *, max_cells: int = PREVIEW_CELLS
) -> list[Image.Image]:
    """Return small pictures of latents z0 (B, C, h, w)."""
    longest = max(z0.shape[-2:])
    if longest > max_cells:
        size = [max(1, side * max_cells // longest) for side in z0.shape[-2:]]
        z0 = F.interpolate(z0, size=size, mode="area")
    pixels = LatentCodec(vae).decode(z0.to(vae.device))
    arrays = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
