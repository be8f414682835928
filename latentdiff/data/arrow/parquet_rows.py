"""Bytes in a binary column of a parquet file, read row by row with little in memory.

A row lies in a row group, which is decoded from its start: rows in order cost one pass, one row out
of order half a row group. Each thread has its own place in the file.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_BYTES = 4 << 20  # decoded at once
MAX_BATCH = 64  # rows decoded at once, however small they are
BUFFER_BYTES = 1 << 20  # read at once
MAX_ROWS = 1 << 40
_threads = threading.local()


def place_of(column: int, row: int) -> int:
    """Pack a column and a row of a file into one number, the offset of an Entry."""
    return column * MAX_ROWS + row


def read_place(path: Path, place: int) -> bytes:
    """Read the bytes at a place. Raises OSError where the file has none there any more."""
    column, row = divmod(place, MAX_ROWS)
    status = path.stat()
    key = (path, column, status.st_ino, status.st_size, status.st_mtime_ns)
    reader: _RowReader | None = getattr(_threads, "reader", None)
    try:
        if reader is None or reader.key != key:
            reader = _RowReader(path, column, key=key)
        _threads.reader = None  # after an error its place is not known
        data = reader.read(row)
    except (pa.ArrowException, IndexError, StopIteration) as error:
        raise OSError(f"{path}, row {row}, cannot be read: {error or 'no such row'}") from error
    _threads.reader = reader
    return data


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file so that a column is read in parts, not whole."""
    return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)


def bytes_column(field: pa.Field) -> str:
    """Name the column, or the part of it, that holds an image column's bytes."""
    return f"{field.name}.bytes" if pa.types.is_struct(field.type) else field.name


def bytes_of(column: pa.Array) -> pa.Array:
    """Give the bytes of an image column, binary or a struct {bytes, path}; null where it is."""
    if not pa.types.is_struct(column.type):
        return column
    return column.flatten()[column.type.get_field_index("bytes")]


def batch_rows(file: pq.ParquetFile, group: int) -> int:
    """Return how many rows of a row group are decoded at once."""
    meta = file.metadata.row_group(group)
    return int(np.clip(BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size), 1, MAX_BATCH))


class _RowReader:
    """Reads the rows of one column, forward within a row group."""

    _batch: pa.Array
    _batches: Iterator[pa.RecordBatch]

    def __init__(self, path: Path, column: int, *, key: tuple[Any, ...]) -> None:
        """key: of the column, and of the file as it is now."""
        self.key = key
        self._file = open_parquet(path)
        self._name = bytes_column(self._file.schema_arrow.field(column))
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self._enter(0)

    def read(self, row: int) -> bytes:
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group != self._group or row < self._start:
            self._enter(group)
        while row >= self._start + len(self._batch):
            self._start += len(self._batch)
            self._batch = bytes_of(next(self._batches).column(0))
        value = self._batch[row - self._start]
        return bytes(value.as_buffer()) if value.is_valid else b""

    def _enter(self, group: int) -> None:
        """Go to the start of a row group. Raises IndexError where there is none."""
        self._start = int(self._ends[group - 1]) if group else 0
        self._group, self._batch = group, pa.array([], pa.binary())
        self._batches = self._file.iter_batches(
            batch_size=batch_rows(self._file, group),
            row_groups=[group],
            columns=[self._name],
            use_threads=False,
        )
