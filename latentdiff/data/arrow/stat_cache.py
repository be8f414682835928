"""Rows known of files by path, size and time, so that only changed files are read.

Ours: a library's disk cache holds pickled objects and looks them up one at a time; rows of
millions of files are columns here, matched at once and mapped into memory.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import CHUNK_ROWS, find_strings, release_memory, take_rows
from latentdiff.data.arrow.listing import LISTING, Entry, Progress
from latentdiff.data.arrow.scan_index import ScanIndex

SAVE_SECONDS = 60.0
FILES_AT_ONCE = 1024
FILES_PER_TASK = 16
IMAGE_THREADS = 4  # that read and decode image files
Read = Callable[[Entry], tuple[Any, ...]]


def cached_rows(
    files: pa.Table,
    read: Read,
    *,
    name: str,
    schema: pa.Schema,
    index: ScanIndex | None = None,
    again: bool = False,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> pa.Table:
    """Give a row of `schema` for each of `files`; both start with the columns of LISTING.

    `read` turns one file into the values of the further columns. It is called, in threads, for
    files that the table `name` of `index` does not have, unchanged, or for all if `again`. The
    table is saved at the end, and every minute until then.
    """
    known = index.load(name, schema) if index is not None else None
    tables = [known if known is not None else schema.empty_table()]
    num_known = len(tables[0])
    at = np.full(len(files), -1, np.int32) if again else find_unchanged(files, tables[0])
    unknown = np.flatnonzero(at < 0).astype(np.int32)
    saved = time.monotonic()
    fresh = take_rows(files, unknown)
    chunks = _read_chunks(fresh, read, schema=schema, num_threads=num_threads, progress=progress)
    for rows in chunks:
        tables.append(rows)
        if index is not None and time.monotonic() - saved > SAVE_SECONDS:
            _save(pa.concat_tables(tables), name, index)
            saved = time.monotonic()
    at[unknown] = np.arange(num_known, num_known + len(unknown), dtype=np.int32)
    table = take_rows(pa.concat_tables(tables), at)
    del known, tables, fresh
    if index is None or not (len(unknown) or num_known != len(table)):
        return table
    _save(table, name, index)
    if (mapped := index.load(name, schema)) is not None and len(mapped) == len(table):
        table = mapped
        release_memory()
    return table


def find_unchanged(files: pa.Table, known: pa.Table) -> np.ndarray:
    """Find each file's row in `known` by path, size and time; -1 if it is new or changed."""
    at = find_strings(files["path"], known["path"])
    there = np.flatnonzero(at >= 0)
    is_same = np.ones(len(there), bool)
    for column in ("size", "mtime_ns", "offset"):
        is_same &= files[column].to_numpy()[there] == known[column].to_numpy()[at[there]]
    at[there[~is_same]] = -1
    return at


def _read_chunks(
    files: pa.Table,
    read: Read,
    *,
    schema: pa.Schema,
    num_threads: int,
    progress: Progress | None,
) -> Iterator[pa.Table]:
    """Read files in threads and yield their rows, FILES_AT_ONCE at a time."""

    def read_some(entries: list[Entry]) -> list[tuple[Any, ...]]:
        return [read(entry) for entry in entries]

    fields = list(schema)[len(LISTING) :]
    with ThreadPoolExecutor(num_threads) as threads:
        for start in range(0, len(files), FILES_AT_ONCE):
            chunk = files.slice(start, FILES_AT_ONCE)
            columns = (chunk[name].to_pylist() for name in ("path", "size", "offset"))
            entries = [Entry(*row) for row in zip(*columns, strict=True)]
            tasks = [entries[i : i + FILES_PER_TASK] for i in range(0, len(chunk), FILES_PER_TASK)]
            read_rows = [row for rows in threads.map(read_some, tasks) for row in rows]
            values = zip(*read_rows, strict=True)
            arrays = [pa.array(one, field.type) for one, field in zip(values, fields, strict=True)]
            if progress is not None:
                progress(start + len(chunk), len(files))
            yield pa.table([*chunk.columns, *arrays], schema=schema)


def _save(table: pa.Table, name: str, index: ScanIndex) -> None:
    """Keep a table, but for files that could not be read: their permissions may change."""
    if "problem" in table.schema.names:
        is_unreadable = pc.fill_null(pc.equal(table["problem"], "unreadable"), False)
        if pc.any(is_unreadable).as_py():
            table = table.filter(pc.invert(is_unreadable))
    # In large parts: a map of small ones has all its pages touched when it is opened.
    starts = range(0, len(table), CHUNK_ROWS)
    parts = (table.slice(start, CHUNK_ROWS).combine_chunks() for start in starts)
    index.save(name, table.schema, parts=parts)
