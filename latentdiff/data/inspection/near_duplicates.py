"""Images that are the same, or nearly: by their bytes, and by a perceptual hash.

The hash is the sign pattern of the lowest cosine frequencies of the grey image (Zauner 2010): it
survives another size, format or JPEG quality. Because it is blind to colour and to fine detail,
close hashes count only if the images, shrunk to 8 x 8 in colour, are close too. Crops of more
than a few percent and mirrored images are not found. Ours: the hashing
libraries do not check colour, nor remember files between runs as a scan index does.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from PIL import Image

from latentdiff.data.arrow.columns import fixed_bytes
from latentdiff.data.arrow.listing import LISTING, Progress
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.folder.content_hash import hash_files
from latentdiff.data.folder.folder import Folder
from latentdiff.image_io import ImageError, load_thumbnail

MAX_BITS = 4  # of 63 may differ
MAX_RMS = 8.0  # of 255, root mean square over the 8 x 8 x 3 small image
PERCEPTUAL_HASHES = pa.schema(
    [
        *LISTING,
        pa.field("digest", pa.binary(16)),
        pa.field("hash", pa.uint64()),
        pa.field("small", pa.binary(192)),  # null where the image cannot be decoded
    ]
)
COSINES = np.cos(np.pi * np.outer(np.arange(8), np.arange(32) + 0.5) / 32)  # (8, 32), DCT-II


@dataclass(frozen=True)
class DuplicateGroup:
    """Equal or nearly equal images, by their indices in the folder, rising."""

    indices: tuple[int, ...]
    is_exact: bool  # the files are equal byte for byte


def find_near_duplicates(
    folder: Folder, *, index: ScanIndex | None = None, progress: Progress | None = None
) -> list[DuplicateGroup]:
    """Group the images of a folder that are the same or nearly so.

    Every image is decoded once, and `index` remembers its hashes. A near group holds one image
    of each set of equal files, so that the two kinds of groups do not overlap.
    """
    hashes = perceptual_hashes(folder, index=index, progress=progress)
    digests = fixed_bytes(hashes["digest"], 16).view("V16").ravel()
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    exact = [DuplicateGroup(group, True) for group in _groups(which)]
    can_decode = hashes["small"].is_valid().to_numpy()
    seen = np.sort(first[can_decode[first]])
    pairs = _close_pairs(hashes["hash"].to_numpy()[seen], fixed_bytes(hashes["small"], 192)[seen])
    labels = _connect(pairs, num=len(seen))
    near = [DuplicateGroup(tuple(seen[list(group)].tolist()), False) for group in _groups(labels)]
    return exact + near


def perceptual_hashes(
    folder: Folder, *, index: ScanIndex | None = None, progress: Progress | None = None
) -> pa.Table:
    """Read each image's digest, perceptual hash and 8 x 8 colours: rows of PERCEPTUAL_HASHES."""
    return hash_files(
        folder,
        _hash_image,
        files=folder.files(),
        name="looks",  # the table's name in a scan index of any version
        schema=PERCEPTUAL_HASHES,
        index=index,
        progress=progress,
    )


def perceptual_hash(image: Image.Image) -> int:
    """Hash an image's grey shape to 64 bits, the first of them 0."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float64)
    low = (COSINES @ grey @ COSINES.T).ravel()  # (64,), the mean grey first
    bits = low > np.median(low[1:])
    bits[0] = False
    return int(np.packbits(bits).view(">u8")[0])


def _hash_image(data: bytes) -> tuple[bytes, int, bytes | None]:
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        image = load_thumbnail(io.BytesIO(data), side=64)
    except ImageError:
        return digest, 0, None
    small = image.resize((8, 8), Image.Resampling.BOX)
    return digest, perceptual_hash(image), small.tobytes()


def _close_pairs(hashes: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Find all pairs (P, 2) that differ by few bits and little colour.

    Two hashes that differ in at most MAX_BITS bits agree in one of MAX_BITS + 1 bands, so only
    hashes that share a band are compared.
    """
    found = [np.zeros((0, 2), np.int64)]
    edges = np.linspace(0, 64, MAX_BITS + 2).astype(np.uint64)
    for low, high in pairwise(edges):
        band = (hashes >> low) & np.uint64((1 << int(high - low)) - 1)
        for pairs in _equal_pairs(band):
            bits = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]])
            close = pairs[bits <= MAX_BITS]
            difference = small[close[:, 0]].astype(np.float32) - small[close[:, 1]]
            found.append(close[np.sqrt((difference**2).mean(axis=1)) <= MAX_RMS])
    return np.concatenate(found)


def _equal_pairs(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Yield all pairs (P, 2) of places with equal keys, in parts of at most N pairs."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    left = np.arange(len(keys))
    for step in range(1, len(keys)):
        left = left[left + step < len(keys)]
        left = left[ordered[left] == ordered[left + step]]
        if not len(left):
            return
        yield np.stack([order[left], order[left + step]], axis=1)


def _connect(pairs: np.ndarray, *, num: int) -> np.ndarray:
    """Give the same label, (num,), to whatever pairs connect."""
    labels = np.arange(num)
    while True:
        before = labels.copy()
        np.minimum.at(labels, pairs[:, 0], before[pairs[:, 1]])
        np.minimum.at(labels, pairs[:, 1], labels[pairs[:, 0]])
        if (labels == before).all():
            return labels


def _groups(labels: np.ndarray) -> list[tuple[int, ...]]:
    """List the places of each label that occurs more than once."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    parts = np.split(order, starts[1:])
    return [tuple(part.tolist()) for part in parts if len(part) > 1]
