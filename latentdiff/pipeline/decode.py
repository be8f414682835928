"""Clean latents to what the caller asked for, past the model's own safety checker if it has one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPImageProcessor

from latentdiff.latents import LatentCodec


def decode(
    latents: Tensor,
    *,
    vae: AutoencoderKL | AutoencoderTiny,
    safety_checker: StableDiffusionSafetyChecker | None,
    feature_extractor: CLIPImageProcessor | None,
    output_type: str,
) -> tuple[Any, list[bool] | None]:
    """Return pictures of an output type, and what the safety checker blacked out (None without).

    latents: (B, C, h, w). Raises ValueError where they are NaN or Inf: an overflow must not become
    a black picture.
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
        pictures = processor.postprocess(pixels, output_type="pil")
        seen = feature_extractor(pictures, return_tensors="pt").pixel_values
        dtype = next(safety_checker.parameters()).dtype
        pixels, flagged = safety_checker(images=pixels, clip_input=seen.to(pixels.device, dtype))
    shown = [not hit for hit in flagged] if flagged is not None else [True] * len(pixels)
    images = processor.postprocess(pixels, output_type=output_type, do_denormalize=shown)
    return images, flagged
