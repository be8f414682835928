"""Image conditions: further channels of a U-Net's input, of an image, a mask or a noise level.

Each kind has the name, the channels and their order of the diffusers pipeline that opens the model
(Rombach et al. 2022, 4.3 to 4.5; Brooks et al. 2023). The channels come after the noisy latents, at
the latents' size. Does not answer for: the kinds' names and counts of channels (compatibility.py),
where images and masks come from (data/), random numbers, or how channels reach the U-Net
(conditioning.py).
"""

from functools import cache

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.schedules import Schedule, make_betas
from latentdiff.models.compatibility import CONDITION_KINDS, NUM_NOISE_LEVELS
from latentdiff.models.latents import LatentCodec

FLAT = 1e-5  # of a map's values: a smaller range is rounding


def inpaint_channels(
    codec: LatentCodec, pixels: Tensor, mask: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Return the mask and the latents of the image without what it hides: (B, 1 + C, h, w).

    pixels: (B, 3, H, W) in [-1, 1]; mask: (B, 1, H, W), 1 where hidden, binary at 0.5. Hidden
    pixels are 0, grey. noise: (B, C, h, w) to sample the posterior, as stock does; None: its mean.
    """
    hidden = (mask >= 0.5).to(pixels)
    latents = codec.encode(pixels * (1 - hidden), noise)
    return torch.cat([F.interpolate(hidden, size=latents.shape[-2:]), latents], dim=1)


def instruct_pix2pix_channels(codec: LatentCodec, pixels: Tensor) -> Tensor:
    """Return the mode of an image's latents, without scale or shift: (B, C, h, w).

    pixels: (B, 3, H, W) in [-1, 1]. Brooks et al. 2023 left out the scale, and stock expects it.
    """
    return codec.raw_moments(pixels)[0]


def upscale_channels(low_res: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Return low-resolution RGB, noised to a level of its own chain: (B, 3, h, w).

    low_res, noise: (B, 3, h, w), the image in [-1, 1] at the latents' size; level: (B,) int64 in
    [0, 1000), which the U-Net reads as its class label.
    """
    return q_sample(low_res_schedule().to(level.device), low_res, level, noise)


def depth_channels(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps at the latents' size, each scaled from its minimum to its maximum: (B, 1, h, w).

    depth: (B, 1, H, W) of any range; size: (h, w). In [-1, 1] as stock's; a constant map is -1.
    """
    return scale_depth(F.interpolate(depth.float(), size=size, mode="bicubic", align_corners=False))


def scale_depth(depth: Tensor) -> Tensor:
    """Scale maps (B, 1, h, w) from their minimum to their maximum to [-1, 1]; a constant is -1."""
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    is_flat = high - low <= FLAT * torch.maximum(low.abs(), high.abs())
    scaled = 2 * (depth - low) / (high - low).masked_fill(is_flat, 1) - 1
    return torch.where(is_flat, -1.0, scaled)


def null_channels(kind: str, codec: LatentCodec, like: Tensor) -> Tensor:
    """Return the channels of a kind that tell nothing of an image, of the shape of `like` (B, ...).

    inpaint: all is hidden; depth: a constant map; else zeros, as image guidance takes them.
    """
    if kind == "inpaint":
        sides = [side * codec.factor for side in like.shape[-2:]]
        device = codec.vae.device
        mask = torch.ones(1, 1, *sides, device=device)
        grey = torch.zeros(1, 3, *sides, device=device)
        return inpaint_channels(codec, grey, mask).to(like).expand_as(like)
    return torch.full_like(like, -1.0 if kind == "depth" else 0.0)


def condition_pixels(kind: str, codec: LatentCodec, channels: Tensor) -> Tensor:
    """Show channels (B, k, h, w) to a person: (B, 3, H, W) in [-1, 1]; latents are decoded."""
    if kind == "inpaint":
        return codec.decode(channels[:, 1:]).clamp(-1, 1)
    if kind == "instruct_pix2pix":
        return codec.decode((channels - codec.shift) * codec.scale).clamp(-1, 1)
    shown = channels.clamp(-1, 1).expand(-1, 3, -1, -1)
    return F.interpolate(shown, scale_factor=codec.factor)


@cache
def low_res_schedule() -> Schedule:
    """Return the chain that noises low-resolution images: that of Stable Diffusion's upscaler."""
    betas = make_betas("scaled_linear", NUM_NOISE_LEVELS, beta_start=1e-4, beta_end=0.02)
    return Schedule.from_betas(betas)


@torch.no_grad()
def add_condition(unet: UNet2DConditionModel, kind: str) -> None:
    """Let a U-Net of text alone read a condition, at first without effect, in place.

    conv_in gets channels of zero weights and keeps its bias; a class embedding begins at zero.
    """
    old, condition = unet.conv_in, CONDITION_KINDS[kind]
    new = nn.Conv2d(
        old.in_channels + condition.num_channels(old.in_channels),
        old.out_channels,
        old.kernel_size,
        padding=old.padding,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    new.load_state_dict({"weight": torch.zeros_like(new.weight), "bias": old.state_dict()["bias"]})
    new.weight[:, : old.in_channels] = old.weight
    unet.conv_in = new.train(unet.training)
    unet.register_to_config(in_channels=new.in_channels)
    if condition.num_class_embeds is not None and unet.class_embedding is None:
        width = unet.time_embedding.linear_2.out_features
        embedding = nn.Embedding(
            condition.num_class_embeds, width, device=old.weight.device, dtype=old.weight.dtype
        )
        embedding.weight.zero_()
        unet.class_embedding = embedding.train(unet.training)
        unet.register_to_config(num_class_embeds=condition.num_class_embeds)
