"""One evaluation of the U-Net, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from latentdiff.cpu.fast_sampling import FastCPU
from latentdiff.diffusion.guidance import classifier_free, is_guided, rescale
from latentdiff.pipeline.prompts import apply_lora_scale

Guide: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # z0 (B, C, h, w) and t to scores (B,)


@dataclass(frozen=True)
class Guidance:
    """Guidance of one call. scale: of classifier-free guidance, 1 is none.

    rescale: in [0, 1], how far the guided prediction's spread is pulled back. interval: the part of
    the chain that is guided, from 0 (pure noise) to 1 (clean). guide: a score of the predicted
    clean latents whose gradient is climbed, guide_scale times; see guide.py.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    guide: Guide | None = None
    guide_scale: float = 1.0

    def acts_at(self, t: Tensor, *, num_timesteps: int) -> bool:
        """Say whether a timestep is guided."""
        start, end = self.interval
        is_whole = (start, end) == (0.0, 1.0)
        return is_whole or is_guided(int(t), start=start, end=end, num_timesteps=num_timesteps)


@dataclass(frozen=True)
class Prediction:
    """What the U-Net says at one step, float32.

    output: (B, C, h, w), or (B, 2C, h, w) with learned variance, guided. difference: the
    conditional minus the unconditional output (B, C, h, w), None without guidance.
    """

    output: Tensor
    difference: Tensor | None


def predict(
    unet: UNet2DConditionModel,
    unet_input: Tensor,
    *,
    t: Tensor,
    states: Tensor,
    guidance: Guidance,
    channels: int,
    lora_scale: float | None = None,
    forward: FastCPU,
    dtype: torch.dtype,
) -> Prediction:
    """Run the U-Net once by `forward`, for both captions at once, and guide its prediction.

    unet_input: (B, C_in, h, w). states: (B, L, D), or (2B, L, D) with the negative prompts first,
    then guidance acts. Of a learned variance (outputs after the first `channels`) the conditional
    one is kept: guidance extrapolates predictions only. dtype: the U-Net's, which is slow to ask.
    """
    has_two = len(states) == 2 * len(unet_input)
    with apply_lora_scale(unet, lora_scale):
        output = forward(
            unet,
            unet_input.to(dtype),
            t,
            states.to(dtype),
            scale=guidance_embedding(unet, guidance.scale, like=unet_input),
        ).float()
    if not has_two:
        return Prediction(output, None)
    uncond, cond = output.chunk(2)
    mean, variance = cond[:, :channels], cond[:, channels:]
    guided = classifier_free(uncond[:, :channels], mean, guidance.scale)
    if guidance.rescale > 0:
        guided = rescale(guided, mean, guidance.rescale)
    return Prediction(torch.cat([guided, variance], dim=1), mean - uncond[:, :channels])


def guidance_embedding(unet: UNet2DConditionModel, scale: float, *, like: Tensor) -> Tensor | None:
    """Return the scale as a distilled U-Net reads it (Meng et al. 2023), (B, D), else None."""
    width = unet.config.time_cond_proj_dim
    if width is None:
        return None
    scales = torch.full((len(like),), (scale - 1) * 1000.0, device=like.device)
    embedding: Tensor = get_timestep_embedding(scales, width, downscale_freq_shift=1)
    return embedding.to(unet.dtype)


def image_size(unet: UNet2DConditionModel, *, factor: int) -> tuple[int, int]:
    """Return (height, width) in pixels that the U-Net was trained at."""
    size = unet.config.sample_size or 64
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height) * factor, int(width) * factor
