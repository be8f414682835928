"""Latents of a folder's pictures, encoded once and kept on disk, addressed by content.

A latent's key is the hash of the picture's bytes, the cut (size, place, flip, background,
interpolation), the VAE's weights and the dtype: whatever changes is encoded again, nothing else is.
Kept are the raw moments, before scale and shift, so each epoch samples afresh and another
scaling_factor costs nothing. Text states are in text_cache.py, and offered here too.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.cache_encode import check_finite, encode_moments, latent_keys
from latentdiff.data.cache_load import CropPlan, decode_ahead
from latentdiff.data.cache_store import MISSING, Store, Writer, in_share
from latentdiff.data.digests import picture_digests
from latentdiff.data.folder import Folder
from latentdiff.data.index import ScanIndex
from latentdiff.data.listing import Progress
from latentdiff.data.text_cache import TextCache
from latentdiff.latents import LatentCodec

__all__ = ["CropPlan", "LatentCache", "TextCache", "prune_cache", "verify_cache"]

LEFTOVER_SECONDS = 3600.0  # a temporary file this old belongs to a process that died


class LatentCache:
    """The posterior of z for every record of a folder. Small: what is read is mapped from disk.

    encoded: how many latents this process had to encode. keys: (V, N, 2) uint64, V = 2 with flips.
    scale, shift: those of the codec; `use_scaling_of` follows a codec whose scaling has changed.
    """

    def __init__(
        self, store: Store, keys: np.ndarray, *, plan: CropPlan, codec: LatentCodec, encoded: int
    ) -> None:
        self.keys, self.plan, self.encoded = keys, plan, encoded
        self.use_scaling_of(codec)
        self._store = store
        self._rows = _find(store, keys)

    @classmethod
    def build(
        cls,
        folder: Folder,
        codec: LatentCodec,
        *,
        cache_dir: Path | str,
        plan: CropPlan,
        flips: bool = False,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
        num_threads: int = 4,
        shard: tuple[int, int] = (0, 1),
        check_rows: bool = False,
        progress: bool = True,
    ) -> "LatentCache":
        """Encode what the cache lacks, with the VAE where it is, and open the result.

        flips: keep the mirrored pictures too. dtype: of what is kept, float32, float16 or bfloat16.
        shard: (rank, world), where this process encodes its share only; what the others encode is
        found when it is asked for, so let all processes finish first. check_rows: read the whole
        cache and encode damaged parts again now, rather than stop when one is met in training.
        What was finished is kept when this is interrupted. Raises ValueError naming the file if a
        picture cannot be decoded or has changed since it was listed, or if a latent is not finite.
        """
        plan.check(folder, factor=codec.factor)
        index = ScanIndex(cache_dir, folder.root)
        with tqdm(desc="hashing", unit="file", leave=False, disable=not progress) as bar:
            digests = picture_digests(folder, index=index, progress=_show(bar))
        keys = latent_keys(digests, codec, plan=plan, flips=flips, dtype=dtype)
        store = Store(Path(cache_dir) / "latents", check_all=check_rows)
        todo = _missing(store, keys, plan=plan, shard=shard)
        writer = Writer(store.folder)
        with tqdm(total=len(todo), desc="encoding", unit="img", disable=not progress) as bar:
            try:
                cuts = (plan.item(*place) for place in todo)
                for items, pixels in decode_ahead(
                    folder, cuts, digests=digests, batch_size=batch_size, num_threads=num_threads
                ):
                    moments = encode_moments(codec, pixels, dtype=dtype)
                    check_finite(moments, folder, items)
                    flipped = [int(item.flip) for item in items]
                    writer.add(keys[flipped, [item.index for item in items]], moments)
                    bar.update(len(items))
            finally:
                writer.flush()
        store.refresh()
        return cls(store, keys, plan=plan, codec=codec, encoded=len(todo))

    def __len__(self) -> int:
        return int(self.keys.shape[1])

    @property
    def num_missing(self) -> int:
        """Latents that other processes have yet to write."""
        self._refresh()
        return int((self._rows == MISSING).sum())

    def moments(self, index: int, *, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z for record `index`, each (C, h, w) float32.

        Raises ValueError for flipped latents that were not built, for one that no process has
        encoded, and for a damaged file.
        """
        mean, std = self.raw_moments(index, flipped=flipped)
        return (mean - self.shift) * self.scale, std * self.scale

    def raw_moments(self, index: int, *, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """Return `moments` before scale and shift."""
        if flipped and len(self.keys) == 1:
            raise ValueError("the cache holds no flipped latents; build it with flips=True")
        if self._rows[int(flipped), index] == MISSING:
            self._refresh()
        row = int(self._rows[int(flipped), index])
        if row == MISSING:
            raise ValueError(
                f"record {index} is not in the cache; let all processes build before one reads"
            )
        moments = self._store.read(row).float()  # (2, C, h, w), or (1, C, h, w) where std is 0
        return moments[0], moments[1] if len(moments) == 2 else torch.zeros_like(moments[0])

    def use_scaling_of(self, codec: LatentCodec) -> None:
        """Take the codec's scale and shift for what is read from now on."""
        self.scale, self.shift = codec.scale, codec.shift

    def _refresh(self) -> None:
        self._store.refresh()
        self._rows = _find(self._store, self.keys)


def verify_cache(
    cache: LatentCache, folder: Folder, codec: LatentCodec, *, num_samples: int = 16
) -> float:
    """Encode a spread of records again and return the largest absolute difference of raw moments.

    Expect float32 rounding, or that of the dtype kept; more means another VAE or another folder.
    """
    if len(cache) != len(folder):
        raise ValueError(f"the cache has {len(cache):,} records and the folder {len(folder):,}")
    places = np.unique(np.linspace(0, len(cache) - 1, min(num_samples, len(cache))).astype(int))
    cuts = (cache.plan.item(i, flip) for i in places.tolist() for flip in range(len(cache.keys)))
    worst = 0.0
    for (item,), pixels in decode_ahead(folder, cuts, digests=None, batch_size=1, num_threads=2):
        fresh = encode_moments(codec, pixels, dtype=torch.float32)[0]  # (2 or 1, C, h, w)
        kept = torch.stack(cache.raw_moments(item.index, flipped=item.flip))
        difference = kept - torch.cat([fresh, torch.zeros_like(fresh)])[:2]
        worst = max(worst, float(difference.abs().nan_to_num(nan=torch.inf).max()))
    return worst


def prune_cache(
    cache_dir: Path | str, keep_keys: Iterable[np.ndarray], *, delete: bool = False
) -> list[tuple[Path, int]]:
    """List the cache files, with their bytes, that hold nothing of `keep_keys`; remove them only if
    `delete`.

    keep_keys: the `keys` of every LatentCache and TextCache still in use. Damaged files and what
    processes that died left half-written are listed too.
    """
    wanted = [keys.reshape(-1, 2) for keys in keep_keys]
    keep = np.concatenate([np.zeros((0, 2), np.uint64), *wanted])
    unused: list[Path] = []
    for name in ("latents", "text"):
        folder = Path(cache_dir) / name
        unused += Store(folder).without(keep)
        unused += sorted(folder.glob("*.damaged"))
        old = time.time() - LEFTOVER_SECONDS
        unused += [path for path in sorted(folder.glob("*.tmp")) if path.stat().st_mtime < old]
    listed = [(path, path.stat().st_size) for path in unused]
    for path in unused if delete else []:
        path.unlink(missing_ok=True)
    return listed


def _find(store: Store, keys: np.ndarray) -> np.ndarray:
    return store.find(keys.reshape(-1, 2)).reshape(keys.shape[:2])


def _missing(
    store: Store, keys: np.ndarray, *, plan: CropPlan, shard: tuple[int, int]
) -> np.ndarray:
    """Find this process's share of what the store lacks, each key once, sorted by size: (M, 2)
    (index, flip)."""
    flat = keys.reshape(-1, 2)
    places = np.flatnonzero((store.find(flat) == MISSING) & in_share(flat, shard))
    _, first = np.unique(flat[places], axis=0, return_index=True)
    flips, indices = np.divmod(places[np.sort(first)], keys.shape[1])
    order = np.lexsort((indices, *plan.sizes[indices].T))
    return np.stack([indices, flips], axis=1)[order]


def _show(bar: tqdm) -> Progress:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show
