"""What is known of files by path, size and time, so that only changed ones are read."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import CHUNK, find_strings, release_memory, take_rows
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.folder.files import LISTING, Entry, Progress

SAVE_SECONDS = 60.0
FILES_AT_ONCE = 1024
Read = Callable[[list[Entry]], list[tuple[Any, ...]]]


def cached_rows(
    files: pa.Table,
    read: Read,
    *,
    name: str,
    schema: pa.Schema,
    index: ScanIndex | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> pa.Table:
    """Give a row of `schema` for each of `files`; both start with the columns of LISTING.

    `read` turns some files into the cells of the further columns. It is called for files that the
    table `name` of `index` does not know or knows otherwise, or for all if `again`; the index then
    learns them, also while this goes on.
    """
    known = index.load(name, schema) if index is not None else None
    known = schema.empty_table() if known is None else known
    num_known = len(known)
    at = np.full(len(files), -1, np.int32) if again else find_unchanged(files, known)
    unknown = np.flatnonzero(at < 0).astype(np.int32)
    fresh = take_rows(files, unknown)
    learnt: list[pa.Table] = []
    saved = time.monotonic()
    for start in range(0, len(fresh), FILES_AT_ONCE):
        learnt.append(_read_chunk(fresh.slice(start, FILES_AT_ONCE), read, schema))
        if progress is not None:
            progress(start + len(learnt[-1]), len(fresh))
        if index is not None and time.monotonic() - saved > SAVE_SECONDS:
            _save(pa.concat_tables([known, *learnt]), name, index)
            saved = time.monotonic()
    at[unknown] = np.arange(num_known, num_known + len(unknown), dtype=np.int32)
    table = take_rows(pa.concat_tables([known, *learnt]), at)
    del known, learnt, fresh
    if index is None or not (len(unknown) or num_known != len(table)):
        return table
    _save(table, name, index)
    mapped = index.load(name, schema)
    if mapped is None or len(mapped) != len(table):
        return table
    del table
    release_memory()
    return mapped


def find_unchanged(files: pa.Table, known: pa.Table) -> np.ndarray:
    """Find each file's row in `known` by path, size and time; -1 if it is new or changed."""
    at = find_strings(files["path"], known["path"])
    there = np.flatnonzero(at >= 0)
    is_same = np.ones(len(there), bool)
    for column in ("size", "mtime_ns", "offset"):
        is_same &= files[column].to_numpy()[there] == known[column].to_numpy()[at[there]]
    at[there[~is_same]] = -1
    return at


def _read_chunk(files: pa.Table, read: Read, schema: pa.Schema) -> pa.Table:
    columns = (files[name].to_pylist() for name in ("path", "size", "offset"))
    cells = zip(*read([Entry(*row) for row in zip(*columns, strict=True)]), strict=True)
    fields = list(schema)[len(LISTING) :]
    arrays = [pa.array(cell, field.type) for cell, field in zip(cells, fields, strict=True)]
    return pa.table([*files.columns, *arrays], schema=schema)


def _save(table: pa.Table, name: str, index: ScanIndex) -> None:
    """Keep a table, but for files that could not be read: their permissions may change."""
    if "problem" in table.schema.names:
        is_unreadable = pc.fill_null(pc.equal(table["problem"], "unreadable"), False)
        if pc.any(is_unreadable).as_py():
            table = table.filter(pc.invert(is_unreadable))
    # In large parts: a map of small ones has all its pages touched when it is opened.
    starts = range(0, len(table), CHUNK)
    parts = (table.slice(start, CHUNK).combine_chunks() for start in starts)
    index.save(name, table.schema, parts)
