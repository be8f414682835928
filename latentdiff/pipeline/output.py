"""What a call returns.

Clean latents to what the caller asked for, past the model's own safety checker if it has one.

Small images of a chain while it runs, cheap enough to make at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from latentdiff.image_grid import to_pil
from latentdiff.models.latents import LatentCodec


@dataclass
class LatentDiffOutput(BaseOutput):
    """Images, the safety checker's verdicts (None without one), and what made each image.

    images: a list of PIL images, an array (B, H, W, 3) in [0, 1], a tensor (B, 3, H, W) in [0, 1],
    or latents (B, C, h, w). seeds: None when the caller passed generators.
    settings: one JSON object an image, which PNG files carry too.
    """

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor
    nsfw_content_detected: list[bool] | None
    seeds: list[int] | None = None
    settings: list[dict[str, Any]] | None = None


def decode(
    latents: Tensor,
    *,
    vae: AutoencoderKL | AutoencoderTiny,
    safety_checker: StableDiffusionSafetyChecker | None,
    feature_extractor: CLIPImageProcessor | None,
    output_type: str,
) -> tuple[Any, list[bool] | None]:
    """Return images of an output type, and what the safety checker blacked out (None without).

    latents: (B, C, h, w). Raises ValueError where they are NaN or Inf: an overflow must not become
    a black image.
    """
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(
            "the latents became NaN or Inf while sampling; lower guidance_scale, or load the "
            "pipeline with torch_dtype=torch.bfloat16 or torch.float32"
        )
    if output_type == "latent":
        return latents, None
    processor = VaeImageProcessor(vae_scale_factor=1)
    pixels, flagged = LatentCodec(vae).decode(latents), None  # (B, 3, H, W), about [-1, 1]
    if safety_checker is not None and feature_extractor is not None:
        checked = processor.postprocess(pixels, output_type="pil")
        seen = feature_extractor(checked, return_tensors="pt").pixel_values
        dtype = next(safety_checker.parameters()).dtype
        pixels, flagged = safety_checker(images=pixels, clip_input=seen.to(pixels.device, dtype))
    shown = [not hit for hit in flagged] if flagged is not None else [True] * len(pixels)
    images = processor.postprocess(pixels, output_type=output_type, do_denormalize=shown)
    return images, flagged


PREVIEW_CELLS = 32


@dataclass
class Preview:
    """A step callback that shows the predicted image; pass it as callback_on_step_end.

    show(i, images) is called after every `every_steps` steps. vae: one of the same latent space
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
    """Return small images of latents z0 (B, C, h, w)."""
    longest = max(z0.shape[-2:])
    if longest > max_cells:
        size = [max(1, side * max_cells // longest) for side in z0.shape[-2:]]
        z0 = F.interpolate(z0, size=size, mode="area")
    pixels = LatentCodec(vae).decode(z0.to(vae.device))
    return [to_pil(one) for one in pixels]
