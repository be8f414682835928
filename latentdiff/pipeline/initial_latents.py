"""Initial latents: noise alone, or an image under noise, with a mask where it is inpainted.

Image-to-image (SDEdit, Meng et al. 2022), inpainting by putting the known part back after each
step (RePaint's first half, Lugmayr et al. 2022), and inpainting U-Nets that read the mask and the
masked image as five more channels (Rombach et al. 2022, 4.5). Which steps `strength` leaves is
decided in schedulers.py.

Each image has its own generator, so that it can be made again alone. Generators live on the CPU, so
that one seed gives one image on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentdiff.diffusion.ddpm import Generators
from latentdiff.models.latents import LatentCodec
from latentdiff.pipeline import checks
from latentdiff.pipeline.image_inputs import ImageInputs


@dataclass(frozen=True)
class InpaintState:
    """Latents of one call, float32 on one device.

    noise, z0, masked_z0: (B, C, h, w); mask: (B, 1, h, w) of 0 (keep) and 1 (paint).
    is_all_noise: the chain starts from noise alone although an image is known. keeps_unmasked: z0
    is put back where mask is 0.
    """

    noise: Tensor
    z0: Tensor | None = None
    mask: Tensor | None = None
    masked_z0: Tensor | None = None
    is_all_noise: bool = False
    keeps_unmasked: bool = False

    def start(self, scheduler: Any, timesteps: Tensor) -> Tensor:
        """Return the latents of the first timestep: noise alone, or the image under noise."""
        if self.z0 is None or self.is_all_noise:
            return self.noise * scheduler.init_noise_sigma
        first = timesteps[:1].repeat(len(self.noise))
        latents: Tensor = scheduler.add_noise(self.z0, self.noise, first)
        return latents

    def unet_input(self, xt: Tensor) -> Tensor:
        """Return the U-Net's input: xt, for an inpainting U-Net with mask and masked image."""
        if self.masked_z0 is None:
            return xt
        assert self.mask is not None
        return torch.cat([xt, self.mask, self.masked_z0], dim=1)  # (B, 2C + 1, h, w)

    def paste_known(self, scheduler: Any, latents: Tensor, later: Tensor) -> Tensor:
        """Put the image back where it is not painted, at the noise of the next timestep."""
        if not self.keeps_unmasked:
            return latents
        assert self.z0 is not None
        assert self.mask is not None
        known = self.z0
        if len(later):
            known = scheduler.add_noise(self.z0, self.noise, later[:1])
        return (1 - self.mask) * known + self.mask * latents


def prepare_latents(
    images: ImageInputs,
    noise: Tensor | None,
    *,
    shape: Sequence[int],
    generator: Generators,
    codec: LatentCodec,
    device: torch.device,
    reads_mask: bool,
) -> InpaintState:
    """Encode the caller's images and sample the noise (B, C, h, w) unless it is given.

    Random numbers come in stock diffusers' order, so that its seeds and ours agree: image,
    noise, masked image; a U-Net that reads the mask needs no image at strength 1, but to keep what
    is not masked, for which the mode of its latents takes no random numbers.
    """
    noise = None if noise is None else noise.to(device, torch.float32)
    if images.image is None:
        return InpaintState(randn(shape, generator, device=device) if noise is None else noise)
    num_images, size = shape[0], [side * codec.factor for side in shape[-2:]]
    pixels = images.pixels(*size, num_images=num_images)
    mask = images.binary_mask(*size, num_images=num_images)

    def encode(part: Tensor) -> Tensor:
        is_random = not isinstance(codec.vae, AutoencoderTiny)
        eps = randn(shape, generator, device=device) if is_random else None
        return codec.encode(part.to(device), eps)

    z0 = None if reads_mask and images.strength == 1 else encode(pixels)
    if z0 is None and images.keep_unmasked:
        z0 = codec.encode(pixels.to(device), None)
    noise = randn(shape, generator, device=device) if noise is None else noise
    if mask is None:
        return InpaintState(noise, z0)
    masked_z0 = encode(pixels * (mask < 0.5))
    small = F.interpolate(mask, size=tuple(shape[-2:])).to(device)
    return InpaintState(
        noise,
        z0,
        small,
        masked_z0 if reads_mask else None,
        is_all_noise=images.strength == 1,
        keeps_unmasked=images.keep_unmasked or not reads_mask,
    )


def generators_for(
    seed: object, generator: Generators | None, *, num_images: int
) -> tuple[list[int] | None, Generators]:
    """Return one seed and one CPU generator an image, or the caller's own generators and no seeds.

    Raises ValueError as `checks.seeds` does.
    """
    seeds = checks.seeds(seed, generator, num_images=num_images)
    if seeds is None:
        assert generator is not None
        return None, list(generator) if isinstance(generator, tuple) else generator
    return seeds, [torch.Generator("cpu").manual_seed(one) for one in seeds]


def randn(shape: Sequence[int], generator: Generators, *, device: torch.device) -> Tensor:
    """Sample standard normal float32 noise (B, C, h, w), image k from generator k alone.

    One generator (no list) samples the whole batch in turn, as diffusers does.
    """
    noise: Tensor = randn_tensor(
        tuple(shape), generator=generator, device=device, dtype=torch.float32
    )
    return noise
