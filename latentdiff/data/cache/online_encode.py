"""Training images without a cache: decoded by workers, encoded at every step.

`OnlineImages` needs no VAE and goes to data workers; `OnlineLatentEncoder` stays where the VAE is,
and replaces LatentCache wherever single latents are read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.data.cache.decode_ahead import CropPlan, load_item
from latentdiff.data.cache.latent_encoding import encode_moments, mean_and_std
from latentdiff.data.folder.folder import Folder
from latentdiff.models.latents import LatentCodec


@dataclass(frozen=True)
class OnlineImages:
    """A folder's images, cropped by a plan. channels, factor: those of the VAE's latents."""

    folder: Folder
    plan: CropPlan
    channels: int
    factor: int

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of record `index`'s latents."""
        height, width = self.plan.sizes[index].tolist()
        return self.channels, height // self.factor, width // self.factor

    def inputs(self, index: int, noise: Tensor, *, flipped: bool, crop: float) -> dict[str, Tensor]:
        """Return the inputs of `OnlineLatentEncoder.encode`: pixels (H, W, 3) uint8, and noise."""
        return {"pixels": self.pixels(index, flipped=flipped, crop=crop), "vae_noise": noise}

    def pixels(self, index: int, *, flipped: bool, crop: float) -> Tensor:
        """Decode and crop one image: (H, W, 3) uint8. ValueError names a damaged image."""
        item = self.plan.item(index, u=crop, flip=flipped)
        return torch.from_numpy(load_item(self.folder, item, digest=None).copy())


class OnlineLatentEncoder:
    """The posterior of z, encoded when it is read."""

    def __init__(self, folder: Folder, codec: LatentCodec, *, plan: CropPlan) -> None:
        plan.check(folder, factor=codec.factor)
        self.codec = codec
        self.images = OnlineImages(folder, plan, codec.channels, codec.factor)

    def __len__(self) -> int:
        return len(self.images.folder)

    @property
    def plan(self) -> CropPlan:
        """How the images are cropped."""
        return self.images.plan

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Sample z0 (B, C, h, w) of pixels (B, H, W, 3) uint8, where the VAE is."""
        moments = encode_moments(self.codec, pixels, dtype=torch.float32)  # (B, 2 or 1, C, h, w)
        mean = (moments[:, 0] - self.codec.shift) * self.codec.scale
        if moments.shape[1] == 1:
            return mean
        noise = noise.to(mean.device, non_blocking=True)
        return mean + moments[:, 1] * self.codec.scale * noise

    def moments(
        self, index: int, *, flipped: bool = False, crop: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z for record `index`, each (C, h, w) float32."""
        mean, std = self.raw_moments(index, flipped=flipped, crop=crop)
        return (mean - self.codec.shift) * self.codec.scale, std * self.codec.scale

    def raw_moments(
        self, index: int, *, flipped: bool = False, crop: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """Return `moments` before scale and shift."""
        pixels = self.images.pixels(index, flipped=flipped, crop=crop)
        return mean_and_std(encode_moments(self.codec, pixels[None], dtype=torch.float32)[0].cpu())

    def use_scaling_of(self, codec: LatentCodec) -> None:
        """Encode with this codec from now on."""
        self.codec = codec
