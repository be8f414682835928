"""The records of several folders as one table, whose ids are paths below a folder above them all.

Each folder is read, checked and split on its own, so that an image is held out whatever stands
next to it. The joined table lies next to the other scans, and is mapped from there.
"""

import json
import os
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import CHUNK_ROWS, combined
from latentdiff.data.arrow.scan_index import ScanIndex, settings_hash
from latentdiff.data.folder.companion_files import EXTENSIONS
from latentdiff.data.folder.problems import Problems
from latentdiff.data.folder.record_table import RECORDS, RECORDS_VERSION, RecordTable, map_records


class SourceTable(NamedTuple):
    """The records of one source, and how often an epoch shows each of them."""

    root: Path
    found: RecordTable
    repeats: int


def join_records(
    sources: Sequence[SourceTable], *, cache_dir: Path | str | None
) -> tuple[Path, RecordTable]:
    """Join tables in their order; return the folder above all roots, and the table.

    Raises ValueError for a root in another, whose images would be there twice.
    """
    roots = [os.path.realpath(source.root) for source in sources]
    for one, other in permutations(roots, 2):
        if (one + os.sep).startswith(other + os.sep):
            raise ValueError(
                f"data.sources: {one} is given twice, or lies in another source; leave one out, "
                "and raise the repeats of the other where its images are to come more often"
            )
    above = Path(os.path.commonpath([os.path.abspath(source.root) for source in sources]))
    prefixes = [_prefix(source.root, above) for source in sources]
    problems = Problems()
    for prefix, source in zip(prefixes, sources, strict=True):
        problems.add_all(source.found.problems, prefix=prefix)
    num_found = sum(source.found.num_found for source in sources)
    index = ScanIndex(cache_dir, above) if cache_dir is not None else None
    if index is not None and (name := _stored_name(sources)):
        if earlier := map_records(index.path(name)):
            return above, earlier
        metadata = {"problems": json.dumps(problems.to_json()), "num_found": str(num_found)}
        parts = _parts(sources, prefixes)
        index.save(name, RECORDS.with_metadata(metadata), parts=parts)
        index.prune("joined-")
        if stored := map_records(index.path(name)):
            return above, stored
    table = pa.concat_tables([RECORDS.empty_table(), *_parts(sources, prefixes)])
    return above, RecordTable(table, problems, num_found)


def _stored_name(sources: Sequence[SourceTable]) -> str | None:
    """Name the joined table after the tables that it is made of; None where one is not stored."""
    if not all(source.found.stored_at for source in sources):
        return None
    tables = [[str(source.found.stored_at), source.repeats] for source in sources]
    return f"joined-{settings_hash({'of': tables, 'version': RECORDS_VERSION})[:16]}"


def _prefix(root: Path, above: Path) -> str:
    """Return what stands before a source's own ids: its path below `above`, and a slash."""
    relative = PurePath(os.path.relpath(os.path.abspath(root), above)).as_posix()
    return "" if relative == "." else f"{relative}/"


def _parts(sources: Sequence[SourceTable], prefixes: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the joined table in parts, so that it never is in memory whole."""
    for number, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
        table = source.found.table
        for start in range(0, len(table), CHUNK_ROWS):
            part = table.slice(start, CHUNK_ROWS).combine_chunks()
            changed = {
                "id": _prefixed(part["id"], prefix),
                **{name: _prefixed_lists(part[name], prefix) for name in EXTENSIONS},
                "repeats": pa.array(part["repeats"].to_numpy() * np.int32(source.repeats)),
                "source": pa.array(np.full(len(part), number, np.int16)),
            }
            columns = [changed.get(name, part[name]) for name in RECORDS.names]
            yield pa.table(columns, schema=RECORDS).combine_chunks()


def _prefixed(names: pa.ChunkedArray, prefix: str) -> pa.ChunkedArray:
    before, between = (pa.scalar(text, pa.large_string()) for text in (prefix, ""))
    return pc.binary_join_element_wise(before, names, between)


def _prefixed_lists(lists: pa.ChunkedArray, prefix: str) -> pa.Array:
    """Put a prefix before each name of lists of them; null stays null."""
    whole = combined(lists)
    if whole.null_count == len(whole):
        return whole
    return pa.LargeListArray.from_arrays(
        whole.offsets, combined(_prefixed(pa.chunked_array([whole.values]), prefix))
    )
