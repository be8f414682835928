"""Tensors on disk, addressed by key: the union of the shards in a folder, and their index.

Shards are only ever added, so any number of processes may write to one folder at once. A store
can always be rebuilt. `CachedVariants` finds the rows of each record of a folder, in every crop.
"""

import errno
import mmap
import shutil
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.cache.decode_ahead import CropPlan, Item
from latentdiff.data.cache.shard_file import (
    DamagedShardError,
    Shard,
    check_rows,
    map_file,
    quarantine,
    read_row,
    read_shard,
    write_shard,
)

SHARD_BYTES, FLUSH_SECONDS = 16 << 20, 60.0
OPEN_SHARDS = 8  # mapped at a time: pages of a map count as memory of the process
MISSING = -1
BAR_DELAY_S = 1.0  # of progress bars: what takes less time needs none
MB = 1_000_000
MORE_ROOM = (
    "free some, or set data.cache_dir to a folder on another disk, or data.cache=false, which "
    "encodes images at every step"
)


def progress_bar(
    desc: str, unit: str, *, progress: bool, total: int | None = None, leave: bool = True
) -> tqdm:
    """Return a bar, shown in a terminal after BAR_DELAY_S, and nowhere without `progress`."""
    shown = None if progress else True
    return tqdm(total=total, desc=desc, unit=unit, leave=leave, delay=BAR_DELAY_S, disable=shown)


class TensorStore:
    """The tensors of one folder. Rows are counted through over all shards; a row's number stays.

    Keys are (N, 2) uint64, two halves of KEY_BYTES.
    """

    def __init__(self, folder: Path, *, check_all: bool = False) -> None:
        self.folder = folder
        self._shards: list[Shard] = []
        self._known: set[str] = set()
        self._starts = np.zeros(1, np.int64)  # each shard's first row
        self._keys = np.zeros((0, 2), np.uint64)
        self._heads = np.zeros(0, np.uint64)  # first halves, sorted
        self._order = np.zeros(0, np.int64)
        self._maps = MappedFiles()
        self.refresh(check_all=check_all)

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self, *, check_all: bool = False) -> None:
        """Add shards written since; damaged shards are quarantined, with a warning.

        check_all: read all rows of new shards now, instead of each row when it is wanted.
        """
        found = []
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._known:
                continue
            try:
                shard, keys = read_shard(path)
                if check_all:
                    check_rows(shard)
            except FileNotFoundError:  # pruned by another process
                continue
            except DamagedShardError as error:
                quarantine(path, error)
                continue
            self._known.add(path.name)
            self._shards.append(shard)
            found.append(keys)
        if found:
            self._keys = np.concatenate([self._keys, *found])
            self._order = np.argsort(self._keys[:, 0], kind="stable")
            self._heads = self._keys[self._order, 0]
            lengths = [len(shard.checks) for shard in self._shards]
            self._starts = np.concatenate([[0], np.cumsum(lengths)])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Find the row of each key (N, 2): (N,) int64, MISSING for none."""
        if not len(self):
            return np.full(len(keys), MISSING)
        at = np.searchsorted(self._heads, keys[:, 0])
        rows = self._order[np.minimum(at, len(self) - 1)]
        # Keys that differ and yet share their first 64 bits count as missing; none ever did.
        return np.where((self._keys[rows] == keys).all(axis=1), rows, MISSING)

    def unreferenced_shards(self, keys: np.ndarray) -> list[Path]:
        """List the shards that hold none of the keys (N, 2)."""
        wanted = np.zeros(len(self), bool)
        rows = self.find(keys)
        wanted[rows[rows != MISSING]] = True
        return [
            shard.path
            for shard, start in zip(self._shards, self._starts, strict=False)
            if not wanted[start : start + len(shard.checks)].any()
        ]

    def read(self, row: int) -> Tensor:
        """Read one row as a tensor of its own, in the dtype it is stored in.

        A damaged row raises ValueError and its shard is quarantined: another build encodes it anew.
        """
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        shard = self._shards[place]
        try:
            data = self._maps.get(shard.path)
            return read_row(shard, row - int(self._starts[place]), data=data)
        except (DamagedShardError, FileNotFoundError) as error:
            if isinstance(error, DamagedShardError):
                quarantine(shard.path, error)
                self._maps.drop(shard.path)
            raise ValueError(
                f"the cache file {shard.path} cannot be used any more ({error}); start again: "
                f"what it held ({len(shard.checks):,} entries) will be encoded anew"
            ) from error


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise OSError where the disk of a store's folder has no room for so many bytes more."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if num_bytes > (free := shutil.disk_usage(there).free):
        raise OSError(
            f"the cache folder {folder} needs {num_bytes / MB:,.1f} MB more, and its disk has "
            f"{free / MB:,.1f} MB free; {MORE_ROOM}"
        )


class StoreWriter:
    """Collects rows and writes shards when there are enough bytes, or a minute has passed.

    Raises OSError, of one message, where the disk is full; shards written before stay.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[tuple[int, ...], list[tuple[np.ndarray, Tensor]]] = {}
        self._num_bytes, self._flushed = 0, time.monotonic()

    def add(self, keys: np.ndarray, rows: Tensor) -> None:
        """Add rows (N, ...) under keys (N, 2)."""
        rows = rows.contiguous().cpu()
        self._rows.setdefault(tuple(rows.shape[1:]), []).append((keys, rows))
        self._num_bytes += rows.nbytes
        if self._num_bytes > SHARD_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows, one shard for each shape."""
        waiting, self._rows = self._rows, {}
        for parts in waiting.values():
            keys = np.concatenate([keys for keys, _ in parts])
            self._write(keys, torch.cat([rows for _, rows in parts]))
        self._num_bytes, self._flushed = 0, time.monotonic()

    def _write(self, keys: np.ndarray, rows: Tensor) -> None:
        try:
            write_shard(self.folder, keys, rows=rows)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"the cache folder {self.folder} has no room for {rows.nbytes / MB:,.1f} MB more "
                f"({error.strerror}); what it holds stays usable; {MORE_ROOM}, and start again"
            ) from error


class MappedFiles:
    """The files that were read last, mapped. Threads may share the maps; a copy in another process
    starts empty."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> "tuple[type[MappedFiles], tuple[()]]":
        return MappedFiles, ()

    def get(self, path: Path) -> mmap.mmap:
        """Map a file. It is unmapped once it was dropped from here and has no readers."""
        with self._lock:
            data = self._maps.pop(path, None) or map_file(path)
            self._maps[path] = data
            while len(self._maps) > OPEN_SHARDS:
                self._maps.popitem(last=False)
            return data

    def drop(self, path: Path) -> None:
        """Forget a file: another may have taken its name."""
        with self._lock:
            self._maps.pop(path, None)


def owned_by_rank(keys: np.ndarray, shard: tuple[int, int]) -> np.ndarray:
    """Select the keys (N, 2) that the process (rank, world) encodes: (N,) bool.

    The choice follows from the key alone: processes that look at different times still agree.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard must be (rank, world) with 0 <= rank < world, got {shard}")
    mine: np.ndarray = keys[:, 0] % np.uint64(world) == rank
    return mine


class CachedVariants:
    """The rows of N records in V variants: the plan's places, each twice with flips, the mirrored
    one second.

    keys: (V, N, 2) uint64. `crop` is a random number in [0, 1) that chooses among the places.
    """

    def __init__(
        self, store: TensorStore, keys: np.ndarray, *, plan: CropPlan, flips: bool
    ) -> None:
        self.keys, self.plan, self.flips = keys, plan, flips
        self._store = store
        self._rows = self._find()

    def __len__(self) -> int:
        return int(self.keys.shape[1])

    def _row(self, index: int, *, flipped: bool, crop: float, name: str) -> Tensor:
        """Read one record's row; ValueError names a record that no process has written."""
        variant = self.plan.variant(crop) * (1 + self.flips) + flipped
        if self._rows[variant, index] == MISSING:
            self._refresh()
        row = int(self._rows[variant, index])
        if row == MISSING:
            raise ValueError(
                f"{name} {index} is not in the cache; let all processes build before one reads"
            )
        return self._store.read(row)

    def _item(self, variant: int, index: int) -> Item:
        place, flip = divmod(variant, 1 + self.flips)
        u = (place + 0.5) / len(self.plan.places)
        return self.plan.item(index, u=u, flip=bool(flip))

    def _missing(self) -> np.ndarray:
        """Find what the store lacks, each key once, sorted by size: (M, 2) (variant, index)."""
        flat = self.keys.reshape(-1, 2)
        places = np.flatnonzero(self._rows.ravel() == MISSING)
        _, first = np.unique(flat[places], axis=0, return_index=True)
        variants, indices = np.divmod(places[np.sort(first)], max(1, len(self)))
        order = np.lexsort((indices, *self.plan.sizes[indices].T))
        return np.stack([variants, indices], axis=1)[order]

    def _share(self, missing: np.ndarray, shard: tuple[int, int]) -> np.ndarray:
        """Return the part of `_missing` that a process (rank, world) makes, in its order."""
        return missing[owned_by_rank(self.keys[missing[:, 0], missing[:, 1]], shard)]

    def _latent_pixels(self, missing: np.ndarray, factor: int) -> int:
        """Count the latent pixels of what is missing, at `factor` image pixels each way."""
        return int((self.plan.sizes[missing[:, 1]].astype(np.int64) // factor).prod(1).sum())

    def _refresh(self) -> None:
        """Find rows that other processes have written meanwhile."""
        self._store.refresh()
        self._rows = self._find()

    def _find(self) -> np.ndarray:
        return self._store.find(self.keys.reshape(-1, 2)).reshape(self.keys.shape[:2])
