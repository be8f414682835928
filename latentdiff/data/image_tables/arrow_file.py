"""Arrow files mapped into memory: their batches, and where in the file a column's bytes lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from latentdiff.data.arrow.parquet_rows import bytes_of
from latentdiff.data.image_tables.table_columns import UnusableTableError

MAGIC = b"ARROW1"  # of a file; a stream, as `datasets` writes, has none


@dataclass(frozen=True)
class ArrowFile:
    """A mapped arrow file or stream."""

    schema: pa.Schema
    reader: pa.RecordBatchReader | pa.ipc.RecordBatchFileReader
    start: int  # address of the map
    size: int  # bytes

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the batches in order; they are parts of the map."""
        if isinstance(self.reader, pa.ipc.RecordBatchFileReader):
            yield from map(self.reader.get_batch, range(self.reader.num_record_batches))
        else:
            yield from self.reader


@contextmanager
def open_arrow(path: Path) -> Iterator[ArrowFile]:
    """Map an arrow file or stream. Raises ArrowInvalid or OSError for a damaged one."""
    with pa.memory_map(str(path)) as source:
        whole = source.read_buffer(source.size())
        source.seek(0)
        is_file = bytes(whole[: len(MAGIC)]) == MAGIC
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        yield ArrowFile(reader.schema, reader, whole.address, whole.size)


def byte_places(images: pa.Array, arrow: ArrowFile) -> np.ndarray:
    """Give the byte in the file at which each image starts, (N,) int64.

    Raises UnusableTableError where the bytes are compressed, and so lie nowhere in the file.
    """
    values = bytes_of(images)
    _, offsets, data = values.buffers()
    if data is None or not data.size or not len(values):
        return np.zeros(len(values), np.int64)
    if not arrow.start <= data.address <= arrow.start + arrow.size - data.size:
        fix = "write it without compression, as Dataset.save_to_disk does, or as parquet"
        raise UnusableTableError("broken_table", f"compressed arrow file. Fix: {fix}")
    kind = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    starts = np.frombuffer(offsets, kind)[values.offset :][: len(values)].astype(np.int64)
    return data.address - arrow.start + starts
