"""Columns of many rows, held in arrow chunks rather than in Python objects."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CHUNK_ROWS = 16_384  # rows of a stored part
OBJECTS_AT_ONCE = 2048  # rows handled as Python objects at one time
CAPTIONS = pa.large_list(pa.large_string())
T = TypeVar("T")


def combined(column: pa.ChunkedArray) -> pa.Array:
    """Give a column as one array, without a copy where it is one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def fixed_bytes(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """View a column of fixed-width bytes as (N, width) uint8; rows that are null hold anything."""
    array = combined(column)
    data = np.frombuffer(array.buffers()[1], np.uint8)
    return data[array.offset * width :][: len(array) * width].reshape(-1, width)


class StringIndex:
    """Finds texts among others by their hashes: 16 bytes a text, a seventh of arrow's own table."""

    def __init__(self, among: pa.Array | pa.ChunkedArray) -> None:
        self._among = among
        hashes = _hashes(among)
        self._order = np.argsort(hashes, kind="stable").astype(np.int32)
        self._sorted = hashes[self._order]

    def find(self, wanted: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Find the first place of each text, (N,) int32; -1 for none."""
        places = np.full(len(wanted), -1, np.int32)
        if not len(self._order):
            return places
        for start in range(0, len(wanted), CHUNK_ROWS):
            texts = wanted.slice(start, CHUNK_ROWS)
            hashes = _hashes(texts)
            at = np.minimum(np.searchsorted(self._sorted, hashes), len(self._order) - 1)
            found = np.where(self._sorted[at] == hashes, self._order[at], -1)
            there = np.flatnonzero(found >= 0)
            same = pc.equal(self._among.take(pa.array(found[there])), texts.take(pa.array(there)))
            for i in there[~same.to_numpy(zero_copy_only=False)]:  # two texts of one hash
                found[i] = pc.index(self._among, texts[int(i)]).as_py()
            places[start : start + CHUNK_ROWS] = found
        return places


def find_strings(
    wanted: pa.Array | pa.ChunkedArray, among: pa.Array | pa.ChunkedArray
) -> np.ndarray:
    """Find the first place of each text in `among`, (N,) int32; -1 for none."""
    return StringIndex(among).find(wanted)


def find_names(wanted: pa.Array | pa.ChunkedArray, among: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Find file names as `find_strings` does, or else under another Unicode form.

    macOS writes names decomposed (NFD), most programs composed (NFC).
    """
    places = find_strings(wanted, among)
    missing = np.flatnonzero(places < 0)
    if len(missing) and not (_is_ascii(wanted) and _is_ascii(among)):
        lost = wanted.take(pa.array(missing))
        places[missing] = find_strings(composed(lost), composed(among))
    return places


def composed(names: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Write names in one Unicode form, NFC."""
    return pc.utf8_normalize(names, form="NFC")


def _is_ascii(texts: pa.Array | pa.ChunkedArray) -> bool:
    return bool(pc.all(pc.string_is_ascii(texts), min_count=0).as_py())


def _hashes(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.fromiter(map(hash, iter_py(texts)), np.int64, count=len(texts))


def take_rows(table: pa.Table, places: np.ndarray) -> pa.Table:
    """Take rows of a table; where they follow one another, without a copy."""
    if len(places) and (np.diff(places) == 1).all():
        return table.slice(int(places[0]), len(places))
    return table.take(pa.array(places)).combine_chunks()


def in_chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Group items into lists of OBJECTS_AT_ONCE; the last may be shorter, none is empty."""
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == OBJECTS_AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def iter_py(array: pa.Array | pa.ChunkedArray, places: np.ndarray | None = None) -> Iterator[Any]:
    """Yield an array's values as Python objects, a chunk at a time; those at `places` if given."""
    num = len(array) if places is None else len(places)
    for start in range(0, num, OBJECTS_AT_ONCE):
        if places is None:
            yield from array.slice(start, OBJECTS_AT_ONCE).to_pylist()
        else:
            yield from array.take(pa.array(places[start : start + OBJECTS_AT_ONCE])).to_pylist()


@contextmanager
def system_memory() -> Iterator[None]:
    """Let arrow take memory from the system: its own pool holds back half as much as it gives.

    Memory that is not used any more is given back at the end.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        release_memory()
        pa.set_memory_pool(before)


def release_memory() -> None:
    """Give memory that arrow holds but no longer uses back to the system."""
    pa.default_memory_pool().release_unused()


def has_extension(paths: pa.Array, extensions: Iterable[str]) -> np.ndarray:
    """Test each path for one of the extensions, in any case: (N,) bool."""
    pattern = "|".join(re.escape(extension) for extension in extensions)
    found: np.ndarray = pc.match_substring_regex(paths, rf"(?i)({pattern})$").to_numpy(False)
    return found


def folders_of(paths: pa.Array) -> pa.Array:
    """Cut the last part off each path; "" for one without a folder."""
    return pc.replace_substring_regex(paths, r"/?[^/]*$", "")


def stems(paths: pa.Array) -> pa.Array:
    """Cut the extension off each path."""
    return pc.replace_substring_regex(paths, r"\.[^./]*$", "")
