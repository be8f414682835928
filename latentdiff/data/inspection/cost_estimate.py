"""The cost of training on a folder: steps, bytes of the cache, and the time to build it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow.compute as pc

from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.data.inspection.statistics import BucketRow
from latentdiff.image_io import ImageError, load_image

if TYPE_CHECKING:  # only a VAE's speed takes it
    import torch

TRIAL_IMAGES, TRIAL_SECONDS = 64, 3.0
Encode: TypeAlias = "Callable[[torch.Tensor], object]"


@dataclass(frozen=True)
class CostEstimate:
    """Cost of an epoch and of the cache. Bytes and seconds are estimates; rates were measured."""

    batch_size: int
    steps_per_epoch: int
    latent_bytes: int
    text_bytes: int
    load_rate: float  # images a second decoded and resized by one process
    encode_rate: float | None  # images a second through the VAE; None if none was given
    seconds: float  # to build the cache with one process


@dataclass(frozen=True)
class CacheShape:
    """Shapes of the latents and prompt embeddings cached of an image and a caption."""

    latent_factor: int = 8
    latent_channels: int = 4
    text_tokens: int = 77
    text_width: int = 768
    value_bytes: int = 4
    copies: int = 1  # of each image: one a crop, twice that with mirror images; 0 without cache


def estimate_cost(
    folder: Folder,
    rows: Sequence[BucketRow],
    *,
    batch_size: int,
    cache: CacheShape,
    encode: Encode | None = None,
) -> CostEstimate:
    """Estimate the cost of training on a folder.

    rows: the buckets of the training split. encode: the VAE's encoder of pixels (1, 3, H, W) in
    [-1, 1]. The folder must not be empty.
    """
    pixels = sum(row.num_images * row.width * row.height for row in rows)
    pixels = int(pixels * len(folder) / max(1, sum(row.num_images for row in rows)))
    values_per_pixel = 2 * cache.latent_channels / cache.latent_factor**2  # mean and variance
    num_texts = len(pc.unique(folder.captions.flatten())) + 1  # and the null caption
    size = (rows[0].height, rows[0].width) if rows else (512, 512)
    load_rate, encode_rate = measure_rates(folder, size=size, encode=encode)
    seconds = len(folder) / load_rate + (len(folder) / encode_rate if encode_rate else 0.0)
    return CostEstimate(
        batch_size=batch_size,
        steps_per_epoch=sum(row.num_batches for row in rows),
        latent_bytes=int(pixels * values_per_pixel) * cache.value_bytes * cache.copies,
        text_bytes=num_texts * cache.text_tokens * cache.text_width * cache.value_bytes,
        load_rate=load_rate,
        encode_rate=encode_rate,
        seconds=seconds,
    )


def measure_rates(
    folder: Folder, *, size: tuple[int, int], encode: Encode | None
) -> tuple[float, float | None]:
    """Measure images a second, loaded and then encoded, on a subsample of the folder.

    size: (height, width) in pixels. Each rate is taken over at most three seconds and 64 images.
    """
    height, width = size
    places = np.linspace(0, len(folder) - 1, min(TRIAL_IMAGES, len(folder))).astype(int)
    start, batch = time.perf_counter(), []
    num_loaded = num_encoded = 0
    for place in places:
        num_loaded += 1
        try:
            image = load_image(io.BytesIO(folder.read_bytes(int(place))))
            batch.append(resize_and_crop(image, height=height, width=width).image)
        except ImageError:
            continue  # a quick scan may believe a damaged file; it costs the same time
        if time.perf_counter() - start > TRIAL_SECONDS:
            break
    load_rate = num_loaded / (time.perf_counter() - start)
    if encode is None or not batch:
        return load_rate, None
    encode(to_pixels(batch[0])[None])  # the first call also sets things up
    start = time.perf_counter()
    for image in batch:
        encode(to_pixels(image)[None])
        num_encoded += 1
        if time.perf_counter() - start > TRIAL_SECONDS:
            break
    return load_rate, num_encoded / (time.perf_counter() - start)
