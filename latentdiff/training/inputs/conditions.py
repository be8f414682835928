"""A run's image conditions: what a data worker reads of one sample, and what the step makes of it.

Every random number follows from the sample's key: which condition of several, the hidden part, the
degradation and its noise. A worker has no VAE: what a VAE must encode comes as pixels, and becomes
channels where the VAE is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from latentdiff.config.data import DataConfig
from latentdiff.config.model import ConditionConfig
from latentdiff.data.cache.latent_cache import LatentCache
from latentdiff.data.cache.mask_cache import MaskCache
from latentdiff.data.cache.online_encode import OnlineImages
from latentdiff.data.captions import CaptionTransform
from latentdiff.data.conditions import Companions, ConditionMaps, MapKind
from latentdiff.data.degradations import DEGRADATIONS
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import uint8_to_pixels
from latentdiff.data.inpaint_masks import random_mask, whole_mask
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import Autoencoder, LatentCodec
from latentdiff.models.unet.image_conditions import (
    inpaint_channels,
    instruct_pix2pix_channels,
    null_channels,
    scale_depth,
    upscale_channels,
)
from latentdiff.training.inputs.encode import (
    MaskSource,
    cache_dir,
    cache_latents,
    cache_maps,
    crop_plan,
)
from latentdiff.training.inputs.randomness import sample_generator, standard_normal

NUM_PREVIEWS, NUM_LOOKED_AT = 8, 64
Generators: TypeAlias = Callable[[str], np.random.Generator]  # by purpose


class ConditionSource(Protocol):
    """Where the conditions of samples come from."""

    def sample(
        self, index: int, *, flipped: bool, crop: float, rng: Generators
    ) -> dict[str, Tensor]:
        """Return condition (k, h, w), or what `ConditionEncoder` makes it of; class_labels."""


@dataclass(frozen=True)
class InpaintSource:
    """Images and what is hidden of them. files: masks, None where they are random."""

    images: OnlineImages
    settings: ConditionConfig
    files: Companions | None

    def sample(
        self, index: int, *, flipped: bool, crop: float, rng: Generators
    ) -> dict[str, Tensor]:
        """Return condition_pixels (H, W, 3) uint8, hidden (1, H, W) uint8, condition_noise."""
        pixels = self.images.pixels(index, flipped=flipped, crop=crop)
        height, width = pixels.shape[:2]
        if rng("whole mask").random() < self.settings.whole_masks:
            mask = whole_mask(height, width)
        elif self.files is not None:
            place = self.files.choose(index, rng("condition").random())
            mask = self.files.mask(place, flipped=flipped, crop=crop)
        else:
            kind = self.settings.masks
            mask = random_mask(rng("inpaint mask"), height=height, width=width, kind=kind)
        noise = standard_normal(rng("condition vae"), self.images.shape(index))
        hidden = torch.from_numpy(mask.copy())[None]
        return {"condition_pixels": pixels, "hidden": hidden, "condition_noise": noise}


@dataclass(frozen=True)
class EditSource:
    """Images to edit, encoded once or at every step."""

    files: Companions
    latents: LatentCache | OnlineImages

    def sample(
        self, index: int, *, flipped: bool, crop: float, rng: Generators
    ) -> dict[str, Tensor]:
        """Return condition (C, h, w), or condition_pixels (H, W, 3) uint8."""
        place = self.files.choose(index, rng("condition").random())
        if isinstance(self.latents, OnlineImages):
            return {"condition_pixels": self.latents.pixels(place, flipped=flipped, crop=crop)}
        return {"condition": self.latents.raw_moments(place, flipped=flipped, crop=crop)[0]}


@dataclass(frozen=True)
class DepthSource:
    """Maps of one channel, read once or at every step."""

    files: Companions
    maps: MaskSource

    def sample(
        self, index: int, *, flipped: bool, crop: float, rng: Generators
    ) -> dict[str, Tensor]:
        """Return condition (1, h, w) in [-1, 1]."""
        place = self.files.choose(index, rng("condition").random())
        depth = self.maps.mask(place, flipped=flipped, crop=crop)
        return {"condition": scale_depth(depth[None])[0]}


@dataclass(frozen=True)
class ControlSource:
    """Images of a ControlNet, read at every step."""

    files: Companions

    def sample(
        self, index: int, *, flipped: bool, crop: float, rng: Generators
    ) -> dict[str, Tensor]:
        """Return control (3, H, W) uint8."""
        place = self.files.choose(index, rng("condition").random())
        pixels = self.files.pixels(place, flipped=flipped, crop=crop)
        return {"control": pixels.permute(2, 0, 1).contiguous()}


@dataclass(frozen=True)
class UpscaleSource:
    """Images in low resolution: made from the images, or files read once or at every step."""

    images: OnlineImages
    settings: ConditionConfig
    files: Companions | None
    maps: MaskSource | None

    def sample(
        self, index: int, *, flipped: bool, crop: float, rng: Generators
    ) -> dict[str, Tensor]:
        """Return condition (3, h, w), noised, and class_labels, its noise level."""
        if self.files is not None and self.maps is not None:
            place = self.files.choose(index, rng("condition").random())
            low_res = self.maps.mask(place, flipped=flipped, crop=crop)
        else:
            low_res = self._degraded(index, flipped=flipped, crop=crop, rng=rng)
        level = torch.tensor([int(rng("noise level").integers(self.settings.max_noise_level + 1))])
        noise = standard_normal(rng("low-resolution noise"), low_res.shape)
        noised = upscale_channels(low_res[None], noise[None], level)[0]
        return {"condition": noised, "class_labels": level[0]}

    def _degraded(self, index: int, *, flipped: bool, crop: float, rng: Generators) -> Tensor:
        """Make an image small, (3, h, w), after it is mirrored as the image that is trained on.

        So JPEG's blocks begin at the mirrored image's left, where a file's are mirrored with it.
        """
        pixels = self.images.pixels(index, flipped=flipped, crop=crop).numpy()
        _, height, width = self.images.shape(index)
        names, degrade = self.settings.degradations, rng("degradation")
        name = names[int(degrade.integers(len(names)))]
        small = DEGRADATIONS[name](Image.fromarray(pixels), (width, height), degrade)
        return uint8_to_pixels(torch.from_numpy(np.array(small))[None])[0]


class ConditionEncoder:
    """Makes channels of what the sources read, where the VAE is."""

    def __init__(self, kind: str, vae: Autoencoder) -> None:
        self.kind, self.codec = kind, LatentCodec(vae)
        self.field = "control" if kind == "controlnet" else "condition"  # of a Conditioning
        self._nulls: dict[torch.Size, Tensor] = {}

    @property
    def uses_vae(self) -> bool:
        """Whether conditions are latents, so that the VAE may be needed at every step."""
        return self.kind in ("inpaint", "instruct_pix2pix")

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor], *, device: torch.device | None = None) -> None:
        """Give a batch its condition (B, k, h, w), in place of what it is made of.

        A ControlNet's becomes control (B, 3, H, W) in [0, 1]. device: by default the VAE's.
        """
        device = device or self.codec.vae.device
        if self.kind == "controlnet":
            batch["control"] = batch["control"].to(device, non_blocking=True).float() / 255
        if (read := batch.pop("condition_pixels", None)) is not None:
            pixels = uint8_to_pixels(read.to(device, non_blocking=True))
            with torch.autocast(device.type, enabled=False):
                batch["condition"] = self._channels(batch, pixels)
        if (dropped := batch.pop("condition_dropped", None)) is not None:
            is_kept = ~dropped.view(-1, 1, 1, 1)
            is_kept = is_kept.to(batch["condition"].device, non_blocking=True)
            batch["condition"] = torch.where(is_kept, batch["condition"], 0.0)

    def null(self, like: Tensor) -> Tensor:
        """Return the condition (k, h, w) that tells nothing, one tensor for all of a size.

        A ControlNet's is black.
        """
        if like.shape not in self._nulls:
            with torch.no_grad():
                self._nulls[like.shape] = (
                    torch.zeros_like(like)
                    if self.kind == "controlnet"
                    else null_channels(self.kind, self.codec, like[None])[0]
                )
        return self._nulls[like.shape]

    def _channels(self, batch: dict[str, Tensor], pixels: Tensor) -> Tensor:
        if self.kind != "inpaint":
            return instruct_pix2pix_channels(self.codec, pixels)
        mask, noise = (
            batch.pop(name).to(pixels.device, non_blocking=True)
            for name in ("hidden", "condition_noise")
        )
        return inpaint_channels(self.codec, pixels, mask.float(), noise).contiguous()


def condition_source(
    folder: Folder,
    settings: ConditionConfig,
    data: DataConfig,
    *,
    kind: str,
    vae: Autoencoder,
    accelerator: Accelerator,
) -> ConditionSource:
    """Return where the conditions of a folder's images come from; what is cached is made now."""
    codec, plan = LatentCodec(vae), crop_plan(folder, data)
    images = OnlineImages(folder, plan, codec.channels, codec.factor)
    if kind == "inpaint":
        masks = None
        if settings.reads_mask_files:
            masks = Companions.of(folder, plan, "inpaint_mask")
        return InpaintSource(images, settings, masks)
    if kind == "upscale" and settings.source == "image":
        return UpscaleSource(images, settings, None, None)
    files = Companions.of(folder, plan, "condition")
    if kind == "controlnet":
        return ControlSource(files)
    if kind == "instruct_pix2pix":
        latents = cache_latents(files.folder, vae, data, accelerator=accelerator, plan=files.plan)
        return EditSource(files, latents if isinstance(latents, LatentCache) else latents.images)
    read = ConditionMaps(files.folder, files.plan, codec.factor, map_kind(kind))
    maps = cache_maps(read, data, accelerator=accelerator)
    return (
        DepthSource(files, maps)
        if kind == "depth"
        else UpscaleSource(images, settings, files, maps)
    )


def condition_keys(
    folder: Folder, kind: str, data: DataConfig, *, codec: LatentCodec
) -> Iterator[np.ndarray]:
    """Yield the keys of what `condition_source` caches of a folder's conditions, if anything."""
    if kind not in ("instruct_pix2pix", "depth", "upscale"):
        return
    files = Companions.of(folder, crop_plan(folder, data), "condition")
    if not len(files.folder):  # made from the images
        return
    if kind == "instruct_pix2pix":
        flips, where = data.random_flip, cache_dir(data)
        yield LatentCache.open(
            files.folder, codec, cache_dir=where, plan=files.plan, flips=flips, progress=False
        ).keys
        return
    maps = ConditionMaps(files.folder, files.plan, codec.factor, map_kind(kind))
    yield MaskCache.open(maps, cache_dir=cache_dir(data)).keys


def map_kind(kind: str) -> MapKind:
    """Return the kind of maps that a kind of condition reads from files."""
    return "depth" if kind == "depth" else "upscale"


@dataclass(frozen=True)
class FixedCondition:
    """The condition (k, h, w) of an image, its noise level if it has one, and a caption for it."""

    caption: str
    condition: Tensor
    class_label: Tensor | None = None


def preview_conditions(
    folder: Folder,
    source: ConditionSource,
    encoder: ConditionEncoder,
    *,
    transform: CaptionTransform,
    seed: int,
) -> list[FixedCondition]:
    """Return the conditions of up to eight images of different captions, for sample sheets."""
    looked_at = np.unique(np.linspace(0, len(folder) - 1, NUM_LOOKED_AT).astype(int)).tolist()
    by_caption = {transform.first(folder[index]): index for index in reversed(looked_at)}
    chosen = sorted(by_caption.items(), key=lambda item: item[1])
    kept = np.unique(np.linspace(0, len(chosen) - 1, NUM_PREVIEWS).astype(int)).tolist()
    found = []
    for caption, index in (chosen[k] for k in kept):

        def rng(purpose: str, index: int = index) -> np.random.Generator:
            return sample_generator(seed, 0, index, 0, f"preview {purpose}")

        read = source.sample(index, flipped=False, crop=0.5, rng=rng)
        fixed = fixed_condition(read, encoder)
        condition = fixed["condition"]
        if encoder.field == "control":
            condition = condition.float() / 255
        found.append(FixedCondition(caption, condition, fixed.get("class_labels")))
    return found


def fixed_condition(read: dict[str, Tensor], encoder: ConditionEncoder) -> dict[str, Tensor]:
    """Return a sample's condition, on the CPU, and class_labels, if any.

    Of a ControlNet the condition is its image as it was read, uint8: many are kept.
    """
    if encoder.field == "control":
        return {"condition": read["control"]}
    batch = {name: tensor[None] for name, tensor in read.items()}
    encoder.encode(batch)
    return {name: tensor[0].cpu() for name, tensor in batch.items()}


def with_labels(text: Conditioning, conditions: Sequence[dict[str, Tensor]]) -> Conditioning:
    """Return the conditioning with the noise levels of its images' conditions, if any."""
    labels = [one["class_labels"] for one in conditions if "class_labels" in one]
    return replace(text, class_labels=torch.stack(labels)) if labels else text
