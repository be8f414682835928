"""Pixels to raw latent moments, and the keys under which the cache stores moments."""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from latentdiff.data.arrow.columns import CHUNK_ROWS
from latentdiff.data.cache.decode_ahead import CropPlan, Item
from latentdiff.data.cache.shard_file import as_keys, key_of
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import uint8_to_pixels
from latentdiff.models.latents import LatentCodec
from latentdiff.models.weights import weights_hash

INTERPOLATION = "bicubic"  # of images.resize_and_crop
CROP = np.dtype([("digest", "u1", 32), ("size", "<i4", 2), ("crop", "<f8", 2), ("flip", "u1")])


def latent_keys(
    digests: np.ndarray, codec: LatentCodec, *, plan: CropPlan, flips: bool, dtype: torch.dtype
) -> np.ndarray:
    """Hash everything a latent depends on: (V, N, 2) uint64, V the plan's places, each twice with
    flips: the mirrored one second.

    digests: (N, 32) of the image files. Scale and shift are not part of the key.
    """
    config = codec.vae.config
    base = {
        "vae": weights_hash(codec.vae),
        "class": type(codec.vae).__name__,
        "settings": [str(config.get(name)) for name in ("act_fn", "norm_num_groups")],
        "dtype": str(dtype),
        "background": plan.background,
        "interpolation": INTERPOLATION,
    }
    return crop_keys(json.dumps(base, sort_keys=True), digests, plan=plan, flips=flips)


def crop_keys(base: str, digests: np.ndarray, *, plan: CropPlan, flips: bool) -> np.ndarray:
    """Hash each image's crops: (V, N, 2) uint64, V as in `latent_keys`.

    base: all that the crops' entries share. digests: (N, 32) of the files.
    """
    start = hashlib.sha256(base.encode()).digest()
    variants = [(place, flip) for place in plan.places for flip in range(1 + flips)]
    keys = np.zeros((len(variants), len(digests), 2), np.uint64)
    for variant, (place, flip) in enumerate(variants):
        for low in range(0, len(digests), CHUNK_ROWS):
            part = slice(low, low + CHUNK_ROWS)
            crops = np.zeros(len(digests[part]), CROP)
            crops["digest"], crops["size"], crops["flip"] = digests[part], plan.sizes[part], flip
            crops["crop"] = place
            if plan.has_room is not None:
                crops["crop"][~plan.has_room[part]] = 0.5
            keys[variant, part] = as_keys(key_of(start, crop) for crop in _each(crops))
    return keys


def _each(rows: np.ndarray) -> Iterator[bytes]:
    """Yield the bytes of each row of an array (N,)."""
    content, size = rows.tobytes(), rows.itemsize
    return (content[at : at + size] for at in range(0, len(content), size))


@torch.no_grad()
def encode_moments(codec: LatentCodec, pixels: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Encode pixels (B, H, W, 3) uint8 to raw moments (B, 2, C, h, w) where the VAE is, or to
    (B, 1, C, h, w) where every standard deviation is 0."""
    device = codec.vae.device
    with torch.autocast(device.type, enabled=False):
        mean, std = codec.raw_moments(uint8_to_pixels(pixels.to(device, non_blocking=True)))
    return torch.stack([mean, std][: num_moments(codec)], dim=1).to(dtype)


def num_moments(codec: LatentCodec) -> int:
    """Count what is stored of a latent: its mean, and its standard deviation unless it is 0."""
    return 1 if isinstance(codec.vae, AutoencoderTiny) else 2


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Take the moments of one image, (2, C, h, w) or (1, C, h, w), apart."""
    mean = moments[0]
    return mean, moments[1] if len(moments) == 2 else torch.zeros_like(mean)


def check_finite(moments: Tensor, items: list[Item], *, folder: Folder) -> None:
    """Raise ValueError naming the images whose moments (B, ...) are not finite."""
    bad = ~moments.isfinite().flatten(1).all(dim=1)
    if bad.any():
        names = [folder[items[i].index].id for i in bad.nonzero().flatten().tolist()]
        raise ValueError(
            f"the VAE gives latents that are not finite numbers for {', '.join(names[:3])}; use a "
            "VAE in float32, and keep latents in float32"
        )
