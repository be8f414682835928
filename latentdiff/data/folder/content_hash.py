"""Hashes of each record's file, read once and stored by path, size and time.

What is cached of an image depends on its bytes and on how its colors are decoded, so both are in
its hash.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentdiff.data.arrow.columns import fixed_bytes, iter_py
from latentdiff.data.arrow.listing import (
    ALONE,
    LISTING,
    Progress,
    read_entry,
    shard_of,
)
from latentdiff.data.arrow.scan_index import ScanIndex, settings_hash
from latentdiff.data.arrow.stat_cache import IMAGE_THREADS, cached_rows
from latentdiff.data.folder.folder import Folder
from latentdiff.icc import VERSION
from latentdiff.image_io import ImageError, read_header

CONTENT_HASHES = pa.schema([*LISTING, pa.field("digest", pa.binary(32))])


def image_hashes(
    folder: Folder, *, index: ScanIndex | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Give the `image_digest` of each record's image file: (N, 32) uint8.

    Files that `index` knows, unchanged, are not opened. Raises OSError for one that cannot be read.
    """
    return _digests(
        folder, folder.files(), image_digest, kind="digests", index=index, progress=progress
    )


def file_hashes(
    folder: Folder, *, index: ScanIndex | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Give the `file_digest` of each record's image file, as `image_hashes` its `image_digest`."""
    return _digests(
        folder, folder.files(), file_digest, kind="file-digests", index=index, progress=progress
    )


def mask_hashes(
    folder: Folder, *, index: ScanIndex | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Give the `file_digest` of each record's mask file, as `image_hashes` does of images."""
    return _digests(
        folder,
        folder.mask_files(),
        file_digest,
        kind="mask-digests",
        index=index,
        progress=progress,
    )


def image_digest(content: bytes) -> bytes:
    """Hash an image file, and the version of the color conversion where the image has one."""
    try:
        is_converted = read_header(io.BytesIO(content)).is_converted
    except ImageError:
        is_converted = False  # the decoder will name the fault
    return file_digest(content + f"icc {VERSION}".encode() if is_converted else content)


def file_digest(content: bytes) -> bytes:
    """Hash a file: its SHA-256."""
    return hashlib.sha256(content).digest()


def hash_files(
    folder: Folder,
    hash_content: Callable[[bytes], tuple[Any, ...]],
    *,
    files: pa.Table,
    name: str,
    schema: pa.Schema,
    index: ScanIndex | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """Give a row of `schema` for each of `files`: LISTING, then the hashes of the file's content.

    Only files that the table `name` of `index` does not know, unchanged, are read.
    """
    times = np.fromiter(_times(folder.root, files), np.int64, count=len(files))
    return cached_rows(
        files.add_column(2, LISTING.field("mtime_ns"), pa.array(times)),
        lambda entry: hash_content(read_entry(folder.root, entry)),
        name=name,
        schema=schema,
        index=index,
        num_threads=IMAGE_THREADS,
        progress=progress,
    )


def _digests(
    folder: Folder,
    files: pa.Table,
    digest: Callable[[bytes], bytes],
    *,
    kind: str,
    index: ScanIndex | None,
    progress: Progress | None,
) -> np.ndarray:
    if not len(folder):
        return np.zeros((0, 32), np.uint8)
    selection = {"num": len(folder), "first": folder[0].id, "last": folder[-1].id}
    name = f"{kind}-{settings_hash(selection)[:8]}"
    if index is not None and not index.path(name).is_file():
        _begin_with_others(index, name, kind=kind)
    table = hash_files(
        folder,
        lambda content: (digest(content),),
        files=files,
        name=name,
        schema=CONTENT_HASHES,
        index=index,
        progress=progress,
    )
    if index is not None:
        index.prune(f"{kind}-")
    return fixed_bytes(table["digest"], 32)


def _begin_with_others(index: ScanIndex, name: str, *, kind: str) -> None:
    """Begin the table of a new selection with what those of others know of the same files."""
    tables = [index.load(other, CONTENT_HASHES) for other in index.names(f"{kind}-")]
    if known := [table for table in tables if table is not None]:
        index.save(name, CONTENT_HASHES, parts=known)


def _times(root: Path, files: pa.Table) -> Iterator[int]:
    """Yield the time of each file, or of the shard that holds it, in ns."""
    shard, shard_time = "", 0
    for path, offset in zip(iter_py(files["path"]), iter_py(files["offset"]), strict=True):
        if offset == ALONE:
            yield os.stat(f"{root}/{path}").st_mtime_ns
            continue
        if shard_of(path) != shard:  # members of a shard follow one another
            shard = shard_of(path)
            shard_time = os.stat(root / shard).st_mtime_ns
        yield shard_time
