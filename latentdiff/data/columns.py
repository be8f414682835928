"""Columns of many rows, held in arrow chunks rather than in Python objects."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CHUNK = 16_384  # rows handled as Python objects at one time
CAPTIONS = pa.large_list(pa.large_string())
T = TypeVar("T")


def whole(column: pa.ChunkedArray) -> pa.Array:
    """Give a column as one array, without a copy where it is one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def find(wanted: pa.Array, among: pa.Array) -> np.ndarray:
    """Find the place of each value in `among`, (N,) int64; -1 for none."""
    found = pc.fill_null(pc.index_in(wanted, value_set=among), -1)
    places: np.ndarray = found.to_numpy().astype(np.int64)
    return places


def take_from(tables: Sequence[pa.Table], places: np.ndarray) -> pa.Table:
    """Take rows out of several tables of one schema, counted through, as a table of one chunk."""
    table = pa.concat_tables(tables)
    if not np.array_equal(places, np.arange(len(table))):
        table = table.take(pa.array(places))
    return table.combine_chunks()


def in_chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Gather items into lists of CHUNK; the last may be shorter, none is empty."""
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def values(array: pa.Array, places: np.ndarray | None = None) -> Iterator[Any]:
    """Yield an array's values as Python objects, a chunk at a time; those at `places` if given."""
    num = len(array) if places is None else len(places)
    for start in range(0, num, CHUNK):
        if places is None:
            yield from array.slice(start, CHUNK).to_pylist()
        else:
            yield from array.take(pa.array(places[start : start + CHUNK])).to_pylist()


def release_memory() -> None:
    """Give memory that arrow holds but no longer uses back to the system."""
    pa.default_memory_pool().release_unused()


def has_extension(paths: pa.Array, extensions: Iterable[str]) -> np.ndarray:
    """Say of each path whether it ends in one of the extensions, in any case: (N,) bool."""
    pattern = "|".join(re.escape(extension) for extension in extensions)
    found: np.ndarray = pc.match_substring_regex(paths, rf"(?i)({pattern})$").to_numpy(False)
    return found


def stems(paths: pa.Array) -> pa.Array:
    """Cut the extension off each path."""
    return pc.replace_substring_regex(paths, r"\.[^./]*$", "")
