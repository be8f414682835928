"""Aspect-ratio buckets: image sizes of one pixel budget, and the order of batches.

Every image lands in one bucket and none is ever dropped: a bucket's last batch is kept smaller,
or filled with images of the same bucket. The order is a function of (seed, epoch) and of each
record's bucket, nothing else, so it is the same for any number of workers and processes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Partial = Literal["keep", "fill"]


@dataclass(frozen=True)
class Bucket:
    """An image size in pixels."""

    height: int
    width: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


def make_buckets(resolution: int, *, multiple: int, max_aspect: float = 2.0) -> tuple[Bucket, ...]:
    """List the buckets of at most resolution^2 pixels, tall to wide, the square one among them.

    Sides are multiples of `multiple` (VAE factor times U-Net factor) and the longer is at most
    `max_aspect` times the shorter; 1 gives the square alone. Raises ValueError for a resolution
    that is not a multiple of `multiple`.
    """
    if resolution < multiple or resolution % multiple:
        below = max(multiple, resolution // multiple * multiple)
        raise ValueError(
            f"data.resolution must be a multiple of {multiple} (VAE factor x U-Net factor), got "
            f"{resolution}; {below} and {below + multiple} are"
        )
    if not max_aspect >= 1.0:
        raise ValueError(f"data.bucket_max_aspect must be at least 1, got {max_aspect}")
    sizes = {(resolution, resolution)}
    for wide in range(resolution, math.floor(resolution * max_aspect) + 1, multiple):
        short = resolution * resolution // wide // multiple * multiple
        if short and wide <= max_aspect * short:
            sizes |= {(short, wide), (wide, short)}
    return tuple(Bucket(h, w) for h, w in sorted(sizes, key=lambda size: (size[1] / size[0], size)))


def assign_buckets(
    widths: np.ndarray, heights: np.ndarray, *, buckets: Sequence[Bucket]
) -> np.ndarray:
    """Give each image the bucket nearest in log aspect ratio: (N,) int16 places in `buckets`."""
    aspects = np.log([bucket.aspect for bucket in buckets])  # rising
    borders = (aspects[1:] + aspects[:-1]) / 2
    places: np.ndarray = np.searchsorted(borders, np.log(widths / heights)).astype(np.int16)
    return places


def crop_loss(
    widths: np.ndarray, heights: np.ndarray, *, bucket_of: np.ndarray, buckets: Sequence[Bucket]
) -> np.ndarray:
    """Give the share of each image's area that its bucket cuts off, (N,) in [0, 1)."""
    there = np.array([bucket.aspect for bucket in buckets])[bucket_of]
    ratio = (widths / heights) / there
    loss: np.ndarray = 1.0 - np.minimum(ratio, 1.0 / ratio)
    return loss


@dataclass(frozen=True)
class Epoch:
    """One epoch's batches. indices: (M,) records in order, M >= N; starts: (K + 1,) batch borders.

    A record's place in `indices` is its place in the epoch's global order.
    """

    indices: np.ndarray
    starts: np.ndarray
    buckets: np.ndarray  # (K,) each batch's bucket

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, batch: int) -> np.ndarray:
        """The record indices of one batch, all in the bucket `buckets[batch]`."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        return self.indices[self.starts[batch] : self.starts[batch + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[batch] for batch in range(len(self)))


def make_epoch(
    bucket_of: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    partial: Partial = "keep",
    order: np.ndarray | None = None,
) -> Epoch:
    """Shuffle records within their buckets, cut batches, and shuffle the batches.

    bucket_of: (N,) integers. batch_size: records per optimiser step over all processes. partial:
    keep a bucket's last batch smaller, or fill it with records from the start of that bucket's
    shuffled list, each as often as any other give or take one. Every record occurs at least once.
    order: (N,) the records' permutation, by default one of (seed, epoch). The batches of a single
    bucket stay in its order.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if order is None:
        order = shuffled(len(bucket_of), seed=seed, epoch=epoch, stream=0)
    order = order[np.argsort(bucket_of[order], kind="stable")]
    buckets, counts = np.unique(bucket_of, return_counts=True)
    parts, sizes, batch_buckets = [], [], []
    for bucket, end, count in zip(buckets, np.cumsum(counts), counts, strict=True):
        num_full, left = divmod(int(count), batch_size)
        batches = [batch_size] * num_full + [left] * (left > 0)
        if partial == "fill":
            batches = [batch_size] * len(batches)
        parts.append(np.resize(order[end - count : end], sum(batches)))  # repeats from its start
        sizes.append(np.array(batches))
        batch_buckets.append(np.full(len(batches), bucket))
    return _shuffle_batches(parts, sizes, batch_buckets, seed=seed, epoch=epoch)


def num_batches(counts: np.ndarray, *, batch_size: int) -> int:
    """Count the batches of an epoch from the buckets' counts; the same for both policies."""
    return int(np.sum(-(-counts // batch_size)))


def shuffled(num: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Permute range(num) by (seed, epoch, stream), (num,) int32.

    Sorts Philox's raw bits (Salmon et al. 2011), which numpy keeps the same in every version.
    """
    key = np.array([seed, epoch], np.uint64)
    source = np.random.Philox(key=key, counter=[0, 0, 0, stream])
    return np.argsort(source.random_raw(num), kind="stable").astype(np.int32)


def _shuffle_batches(
    parts: list[np.ndarray],
    sizes: list[np.ndarray],
    batch_buckets: list[np.ndarray],
    *,
    seed: int,
    epoch: int,
) -> Epoch:
    if not parts:
        return Epoch(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int16))
    size = np.concatenate(sizes)
    start = np.cumsum(size) - size
    order = np.arange(len(size))
    if len(parts) > 1:
        order = shuffled(len(size), seed=seed, epoch=epoch, stream=1)
    starts = np.concatenate([[0], np.cumsum(size[order])])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], size[order])
    indices = np.concatenate(parts)[np.repeat(start[order], size[order]) + within]
    return Epoch(indices, starts, np.concatenate(batch_buckets)[order])
