"""The output of a call: clean latents decoded to images, past the model's own safety checker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from latentdiff.models.latents import LatentCodec

LARGE = 512 * 512  # pixels, above which each image is decoded alone: SDXL's take GBs each


@dataclass
class LatentDiffOutput(BaseOutput):
    """Images, the safety checker's verdicts (None without one), seeds and generation metadata.

    images: a list of PIL images, an array (B, H, W, 3) in [0, 1], a tensor (B, 3, H, W) in [0, 1],
    or latents (B, C, h, w). seeds: None when the caller passed generators.
    settings: one JSON object an image, stored in PNG files too (png_metadata.py).
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
    """Return images of an output type, and the images that the safety checker blacked out.

    latents: (B, C, h, w). Raises ValueError where they are NaN or Inf: an overflow must not become
    a black image.
    """
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(
            "the latents became NaN or Inf while sampling; lower guidance_scale, or load the "
            "pipeline with dtype=torch.bfloat16 or torch.float32"
        )
    if output_type == "latent":
        return latents, None
    processor = VaeImageProcessor(vae_scale_factor=1)
    codec, flagged = LatentCodec(vae), None
    is_large = latents.shape[-2:].numel() * codec.factor**2 > LARGE
    pixels = codec.decode(
        latents, chunk_size=1 if is_large else None
    )  # (B, 3, H, W), about [-1, 1]
    if safety_checker is not None and feature_extractor is not None:
        checked = processor.postprocess(pixels, output_type="pil")
        seen = feature_extractor(checked, return_tensors="pt").pixel_values
        dtype = next(safety_checker.parameters()).dtype
        pixels, flagged = safety_checker(images=pixels, clip_input=seen.to(pixels.device, dtype))
    shown = [not hit for hit in flagged] if flagged is not None else [True] * len(pixels)
    images = processor.postprocess(pixels, output_type=output_type, do_denormalize=shown)
    return images, flagged
