"""Latents of a folder's images, encoded once and kept on disk, addressed by content.

A latent's key is the hash of the image's bytes, the crop (size, place, flip, background,
interpolation), the VAE's weights and the dtype: a changed image is encoded again, no other is.
Stored are the raw moments, before scale and shift, so each epoch samples afresh and another
scaling_factor costs nothing. Ours: no library's cache is keyed by content, shared by processes
and checked row by row.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.arrow.listing import Progress
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.cache.decode_ahead import Batch, CropPlan, decode_ahead
from latentdiff.data.cache.latent_encoding import (
    check_finite,
    encode_moments,
    latent_keys,
    mean_and_std,
    num_moments,
)
from latentdiff.data.cache.tensor_store import (
    MISSING,
    CachedVariants,
    StoreWriter,
    TensorStore,
    check_room,
    progress_bar,
)
from latentdiff.data.folder.content_hash import image_hashes
from latentdiff.data.folder.folder import Folder
from latentdiff.models.latents import LatentCodec

LEFTOVER_SECONDS = 3600.0  # a temporary file this old belongs to a process that died


class LatentCache(CachedVariants):
    """The posterior of z for every record of a folder, mapped from disk.

    num_encoded: latents that this process had to encode. keys: see latent_keys. scale, shift: of
    the codec; `use_scaling_of` follows a codec whose scaling has changed.
    """

    def __init__(
        self,
        store: TensorStore,
        keys: np.ndarray,
        *,
        plan: CropPlan,
        flips: bool,
        codec: LatentCodec,
    ) -> None:
        super().__init__(store, keys, plan=plan, flips=flips)
        self.num_encoded, self.factor, self.channels = 0, codec.factor, codec.channels
        self.use_scaling_of(codec)

    @classmethod
    def open(
        cls,
        folder: Folder,
        codec: LatentCodec,
        *,
        cache_dir: Path | str,
        plan: CropPlan,
        flips: bool = False,
        dtype: torch.dtype = torch.float32,
        check_rows: bool = False,
        digests: np.ndarray | None = None,
        progress: bool = True,
    ) -> "LatentCache":
        """Open the cache as it is, and encode nothing; the settings are those of `build`.

        digests: of `image_hashes(folder)`, computed unless given.
        """
        plan.check(folder, factor=codec.factor)
        if not plan.places:
            raise ValueError("a plan that crops anywhere cannot be cached; give it places")
        if digests is None:
            digests = _digests(folder, cache_dir, progress=progress)
        keys = latent_keys(digests, codec, plan=plan, flips=flips, dtype=dtype)
        store = TensorStore(Path(cache_dir) / "latents", check_all=check_rows)
        return cls(store, keys, plan=plan, flips=flips, codec=codec)

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
        num_threads: int = 8,
        shard: tuple[int, int] = (0, 1),
        check_rows: bool = False,
        progress: bool = True,
    ) -> "LatentCache":
        """Encode the missing latents, on the VAE's device, and open the result.

        flips: store mirrored images too. dtype: of the stored moments. shard: (rank, world), to
        encode a share; let all processes finish before one reads. check_rows: encode damaged rows
        again now, rather than stop at one in training. An interruption loses no finished latent.
        ValueError names a file that is damaged, has changed, or gives non-finite latents.
        """
        digests = _digests(folder, cache_dir, progress=progress)
        cache = cls.open(
            folder,
            codec,
            digests=digests,
            cache_dir=cache_dir,
            plan=plan,
            flips=flips,
            dtype=dtype,
            check_rows=check_rows,
        )
        missing = cache._missing()
        num_values = cache._latent_pixels(missing, cache.factor) * cache.channels
        check_room(cache._store.folder, num_values * num_moments(codec) * dtype.itemsize)
        todo = cache._share(missing, shard)
        items = (cache._item(variant, index) for variant, index in todo.tolist())
        batches = decode_ahead(
            folder, items, digests=digests, batch_size=batch_size, num_threads=num_threads
        )
        cache._encode(batches, todo, codec=codec, folder=folder, dtype=dtype, progress=progress)
        return cache

    def _encode(
        self,
        batches: Iterator[Batch],
        todo: np.ndarray,
        *,
        codec: LatentCodec,
        folder: Folder,
        dtype: torch.dtype,
        progress: bool,
    ) -> None:
        """Encode and store batches of the (M, 2) variants and indices of `todo`, in its order."""
        writer, done = StoreWriter(self._store.folder), 0
        with progress_bar("encoding", " images", progress=progress, total=len(todo)) as bar:
            try:
                for items, pixels in batches:
                    moments = encode_moments(codec, pixels, dtype=dtype).cpu()
                    check_finite(moments, items, folder=folder)
                    places = todo[done : done + len(items)]
                    writer.add(self.keys[places[:, 0], places[:, 1]], moments)
                    done += len(items)
                    bar.update(len(items))
            finally:
                writer.flush()
        self.num_encoded = len(todo)
        self._refresh()

    @property
    def num_missing(self) -> int:
        """Number of latents that no process has written yet."""
        self._refresh()
        return len(np.unique(self.keys[self._rows == MISSING], axis=0))

    def complete_records(self) -> np.ndarray:
        """List the indices of records with every variant encoded, rising."""
        self._refresh()
        return np.flatnonzero((self._rows != MISSING).all(axis=0))

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of record `index`'s latents."""
        height, width = self.plan.sizes[index].tolist()
        return self.channels, height // self.factor, width // self.factor

    def inputs(self, index: int, noise: Tensor, *, flipped: bool, crop: float) -> dict[str, Tensor]:
        """Return {"z0": a sample of z} for standard normal noise (C, h, w)."""
        mean, std = self.moments(index, flipped=flipped, crop=crop)
        return {"z0": mean + std * noise}

    def moments(
        self, index: int, *, flipped: bool = False, crop: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z for record `index`, each (C, h, w) float32.

        Raises ValueError for flipped latents that were not built, for one that no process has
        encoded, and for a damaged file.
        """
        mean, std = self.raw_moments(index, flipped=flipped, crop=crop)
        return (mean - self.shift) * self.scale, std * self.scale

    def raw_moments(
        self, index: int, *, flipped: bool = False, crop: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """Return `moments` before scale and shift."""
        if flipped and not self.flips:
            raise ValueError("the cache holds no flipped latents; build it with flips=True")
        row = self._row(index, flipped=flipped, crop=crop, name="record")
        return mean_and_std(row.float())

    def use_scaling_of(self, codec: LatentCodec) -> None:
        """Apply the codec's scale and shift to latents read from now on."""
        self.scale, self.shift = codec.scale, codec.shift


def verify_cache(
    cache: LatentCache, folder: Folder, *, codec: LatentCodec, num_samples: int = 16
) -> float:
    """Encode a subsample of records again; return the largest absolute difference of raw moments.

    Records not encoded in every variant yet are skipped. Expect float32 rounding, or that of the
    stored dtype; more means another VAE or another folder.
    """
    if len(cache) != len(folder):
        raise ValueError(f"the cache has {len(cache):,} records and the folder {len(folder):,}")
    there = cache.complete_records()
    chosen = np.linspace(0, len(there) - 1, min(num_samples, len(there))).astype(int)
    places = there[np.unique(chosen)]
    flips = range(1 + cache.flips)
    crops = (cache.plan.item(i, u=0.5, flip=bool(flip)) for i in places.tolist() for flip in flips)
    worst = 0.0
    for (item,), pixels in decode_ahead(folder, crops, digests=None, batch_size=1, num_threads=2):
        moments = encode_moments(codec, pixels, dtype=torch.float32)[0].cpu()
        fresh = torch.stack(mean_and_std(moments))
        kept = torch.stack(cache.raw_moments(item.index, flipped=item.flip, crop=0.5))
        difference = kept - fresh
        worst = max(worst, float(difference.abs().nan_to_num(nan=torch.inf).max()))
    return worst


def prune_cache(
    cache_dir: Path | str, keep_keys: Iterable[np.ndarray], *, delete: bool = False
) -> list[tuple[Path, int]]:
    """List the cache files, with their bytes, that hold none of `keep_keys`; `delete` removes them.

    keep_keys: the `keys` of every LatentCache, MaskCache and PromptCache still in use. Damaged
    files, and files that processes left half-written when they died, are listed too.
    """
    wanted = [keys.reshape(-1, 2) for keys in keep_keys]
    keep = np.concatenate([np.zeros((0, 2), np.uint64), *wanted])
    unused: list[Path] = []
    for name in ("latents", "masks", "text"):
        folder = Path(cache_dir) / name
        unused += TensorStore(folder).unreferenced_shards(keep)
        unused += sorted(folder.glob("*.damaged"))
        old = time.time() - LEFTOVER_SECONDS
        unused += [path for path in sorted(folder.glob("*.tmp")) if path.stat().st_mtime < old]
    listed = [(path, path.stat().st_size) for path in unused]
    for path in unused if delete else []:
        path.unlink(missing_ok=True)
    return listed


def _digests(folder: Folder, cache_dir: Path | str, *, progress: bool) -> np.ndarray:
    index = ScanIndex(cache_dir, folder.root)
    with progress_bar("hashing", " files", progress=progress, leave=False) as bar:
        return image_hashes(folder, index=index, progress=_show(bar))


def _show(bar: tqdm) -> Progress:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show
