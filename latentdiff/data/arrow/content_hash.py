"""The content of each image file as a hash, read once and remembered by path, size and time."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from latentdiff.data.arrow.columns import combined
from latentdiff.data.arrow.scan_index import ScanIndex, fingerprint
from latentdiff.data.arrow.stat_cache import cached_rows
from latentdiff.data.folder.files import (
    ALONE,
    LISTING,
    Columns,
    Entry,
    Progress,
    read_entry,
    shard_of,
)
from latentdiff.data.folder.folder import Folder

DIGESTS = pa.schema([*LISTING, pa.field("digest", pa.binary(32))])
NUM_THREADS = 4


def image_hashes(
    folder: Folder, *, index: ScanIndex | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Give the SHA-256 of each record's image file: (N, 32) uint8.

    Files that `index` knows, unchanged, are not opened. Raises OSError for one that cannot be read.
    """
    return _hashes(folder, folder.entries, kind="digests", index=index, progress=progress)


def mask_hashes(
    folder: Folder, *, index: ScanIndex | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Give the SHA-256 of each record's mask file, as `image_digests` does of images."""
    return _hashes(folder, folder.mask_entries, kind="mask-digests", index=index, progress=progress)


def _hashes(
    folder: Folder,
    entries_of: Callable[[], Iterator[Entry]],
    *,
    kind: str,
    index: ScanIndex | None,
    progress: Progress | None,
) -> np.ndarray:
    if not len(folder):
        return np.zeros((0, 32), np.uint8)
    selection = {"num": len(folder), "first": folder[0].id, "last": folder[-1].id}
    name = f"{kind}-{fingerprint(selection)[:8]}"

    def read(entries: list[Entry]) -> list[tuple[Any, ...]]:
        return list(threads.map(lambda entry: (_hash(folder, entry),), entries))

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        table = cached_rows(
            _listing(folder, entries_of()),
            read,
            name=name,
            schema=DIGESTS,
            index=index,
            progress=progress,
        )
    if index is not None:
        index.prune(f"{kind}-")
    column = combined(table["digest"])
    data = np.frombuffer(column.buffers()[1], np.uint8)
    return data[column.offset * 32 :][: len(column) * 32].reshape(-1, 32)


def _listing(folder: Folder, entries: Iterator[Entry]) -> pa.Table:
    columns = Columns()
    for entry, time_ns in _dated(folder, entries):
        columns.add(entry.path, size=entry.size, mtime_ns=time_ns, offset=entry.offset)
    return columns.table()


def _dated(folder: Folder, entries: Iterator[Entry]) -> Iterator[tuple[Entry, int]]:
    shard, shard_time = "", 0
    for entry in entries:
        if entry.offset == ALONE:
            yield entry, os.stat(folder.root / entry.path).st_mtime_ns
            continue
        if shard_of(entry.path) != shard:  # members of a shard follow one another
            shard = shard_of(entry.path)
            shard_time = os.stat(folder.root / shard).st_mtime_ns
        yield entry, shard_time


def _hash(folder: Folder, entry: Entry) -> bytes:
    return hashlib.sha256(read_entry(folder.root, entry)).digest()
