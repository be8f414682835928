"""Listings of files and shard members as arrow columns, and how one of them is opened.

An entry is a file of its own, or a member of a tar shard or of a table with images: at a byte
offset, or at a place in a parquet file.
"""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa

from latentdiff.data.arrow.columns import CHUNK_ROWS
from latentdiff.data.arrow.parquet_rows import read_place

ALONE = -1  # the offset of a file that is no member of a shard
SHARD = ".tar/"  # stands between a shard's path and its member's name
TABLES = (".parquet", ".arrow")  # with images in them; a member is FILE/00000012, by its row
TABLE_ROW = re.compile(r"(?i)(?<=\.)(parquet|arrow)/\d{8,}$")
Progress = Callable[[int, int], None]  # (done, total)
LISTING = pa.schema(
    [
        ("path", pa.large_string()),  # posix, relative to the root
        ("size", pa.int64()),  # bytes
        ("mtime_ns", pa.int64()),  # of a shard's member: the shard's
        ("offset", pa.int64()),  # in the shard or table, or ALONE
    ]
)


class Entry(NamedTuple):
    """A file or member: path (of a member shard.tar/name), bytes, and offset, or ALONE.

    The offset in a parquet file is a place of parquet_rows.
    """

    path: str
    size: int
    offset: int = ALONE


def open_entry(root: Path, entry: Entry) -> BinaryIO:
    """Open a file for reading; of a member, nothing beyond it can be read."""
    if entry.offset == ALONE:
        return open(root / entry.path, "rb")
    shard = root / shard_of(entry.path)
    if shard.suffix.lower() == ".parquet":
        return io.BytesIO(read_place(shard, entry.offset))
    member = _ShardMember(shard, entry.offset, entry.size)
    return cast(BinaryIO, io.BufferedReader(member))


def read_entry(root: Path, entry: Entry) -> bytes:
    """Read a whole file or member. Raises OSError where a shard has become shorter."""
    if entry.offset == ALONE:
        return (root / entry.path).read_bytes()
    with open_entry(root, entry) as file:
        data = file.read()
    if len(data) != entry.size:
        raise OSError(f"{entry.path}: expected {entry.size:,} bytes, got {len(data):,}")
    return data


def shard_of(path: str) -> str:
    """Name the shard, or the table, of a member's path."""
    if is_table_row(path):
        return path.rpartition("/")[0]
    return path[: path.index(SHARD) + len(SHARD) - 1]


def is_table_row(path: str) -> bool:
    """Return whether a member's path names a row of a table."""
    return TABLE_ROW.search(path) is not None


@dataclass
class ListingBuilder:
    """Rows of LISTING, collected in arrow chunks, so that a million take little memory."""

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    batches: list[pa.RecordBatch] = field(default_factory=list)

    def add(self, path: str, *, size: int, mtime_ns: int, offset: int = ALONE) -> None:
        self.paths.append(path)
        self.sizes.append(size)
        self.times.append(mtime_ns)
        self.offsets.append(offset)
        if len(self.paths) >= CHUNK_ROWS:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self.batches, LISTING)

    def _flush(self) -> None:
        columns = [self.paths, self.sizes, self.times, self.offsets]
        self.batches.append(pa.record_batch(columns, schema=LISTING))
        self.paths, self.sizes, self.times, self.offsets = [], [], [], []


class _ShardMember(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + position)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer
        num = min(len(buffer), max(0, self._size - self._position))
        data = os.pread(self._file.fileno(), num, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
