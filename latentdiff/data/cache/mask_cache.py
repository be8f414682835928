"""Masks and other maps at the size of latents, kept on disk next to these, addressed by content.

A key is the hash of the map's file, the crop and the VAE's factor: a map that changes is read
again, and nothing else is; no latent depends on a map.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.cache.decode_ahead import CropPlan, Item
from latentdiff.data.cache.latent_encoding import crop_keys
from latentdiff.data.cache.tensor_store import (
    CachedVariants,
    StoreWriter,
    TensorStore,
    check_room,
    progress_bar,
)
from latentdiff.data.folder.folder import Folder

MASKS_AT_ONCE = 256


class LatentMaps(Protocol):
    """Maps that are read from files: masks.Masks, conditions.ConditionMaps."""

    @property
    def folder(self) -> Folder: ...
    @property
    def plan(self) -> CropPlan: ...
    @property
    def factor(self) -> int: ...
    @property
    def channels(self) -> int: ...

    def key_base(self) -> dict[str, Any]:
        """Return what all keys share."""

    def digests(self, index: ScanIndex) -> np.ndarray:
        """Return the hash of each map's file: (N, 32) uint8."""

    def latent_mask(self, item: Item, *, digest: bytes | None) -> Tensor:
        """Decode one crop, not mirrored: (k, h, w). digest: of the file, to notice a change."""


class MaskCache(CachedVariants):
    """The mask, or another map, of every record of a folder, mapped from disk.

    num_read: masks that this process had to read. No mask is stored mirrored: it is mirrored when
    it is read.
    """

    def __init__(self, store: TensorStore, keys: np.ndarray, *, plan: CropPlan) -> None:
        super().__init__(store, keys, plan=plan, flips=False)
        self.num_read = 0

    @classmethod
    def open(cls, masks: LatentMaps, *, cache_dir: Path | str) -> "MaskCache":
        """Open the cache as it is, and read no mask."""
        keys = mask_keys(masks, _digests(masks, cache_dir))
        return cls(TensorStore(Path(cache_dir) / "masks"), keys, plan=masks.plan)

    @classmethod
    def build(
        cls,
        masks: LatentMaps,
        *,
        cache_dir: Path | str,
        num_threads: int = 8,
        shard: tuple[int, int] = (0, 1),
        progress: bool = True,
    ) -> "MaskCache":
        """Read the missing masks, and open the result; shard: as in LatentCache.build.

        After an interruption, finished masks stay. ValueError names a mask that cannot be
        read, or has changed since it was listed.
        """
        digests = _digests(masks, cache_dir)
        cache = cls.open(masks, cache_dir=cache_dir)
        missing = cache._missing()
        num_values = cache._latent_pixels(missing, masks.factor) * masks.channels
        check_room(cache._store.folder, num_values * torch.float32.itemsize)
        todo = cache._share(missing, shard)
        writer = StoreWriter(cache._store.folder)

        def read(place: tuple[int, int]) -> Tensor:
            return masks.latent_mask(cache._item(*place), digest=digests[place[1]].tobytes())

        with (
            progress_bar("masks", " images", progress=progress, total=len(todo)) as bar,
            ThreadPoolExecutor(num_threads) as threads,
        ):
            try:
                for places in _of_one_size(todo, masks.plan.sizes):
                    rows = torch.stack(list(threads.map(read, places.tolist())))
                    writer.add(cache.keys[places[:, 0], places[:, 1]], rows)
                    bar.update(len(places))
            finally:
                writer.flush()
        cache.num_read = len(todo)
        cache._refresh()
        return cache

    def mask(self, index: int, *, flipped: bool, crop: float) -> Tensor:
        """Return the map of record `index` as its files have it: (k, h, w) float32.

        ValueError names a mask that no process has read.
        """
        mask = self._row(index, flipped=False, crop=crop, name="the mask of record")
        return mask.flip(-1) if flipped else mask


def mask_keys(masks: LatentMaps, digests: np.ndarray) -> np.ndarray:
    """Hash everything that a stored mask depends on: (V, N, 2) uint64.

    digests: (N, 32) of the files.
    """
    base = json.dumps(masks.key_base(), sort_keys=True)
    return crop_keys(base, digests, plan=masks.plan, flips=False)


def _digests(masks: LatentMaps, cache_dir: Path | str) -> np.ndarray:
    return masks.digests(ScanIndex(cache_dir, masks.folder.root))


def _of_one_size(places: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Split (M, 2) places, sorted by size, into parts of one size and at most MASKS_AT_ONCE."""
    changes = np.flatnonzero((np.diff(sizes[places[:, 1]], axis=0) != 0).any(axis=1)) + 1
    parts = np.split(places, changes)
    return [
        part[start : start + MASKS_AT_ONCE]
        for part in parts
        for start in range(0, len(part), MASKS_AT_ONCE)
    ]
