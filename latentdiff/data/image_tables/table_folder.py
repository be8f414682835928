"""Data sets whose images lie in tables: parquet as the Hub stores them, arrow by `save_to_disk`.

Each row becomes a member FILE/00000012 of its file, as a shard's images are members of the shard.
Tables are read in small batches, and only lengths and captions are kept. Ours: `datasets` gives
rows as Python objects, decodes them, and copies parquet to arrow first.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import CAPTIONS, OBJECTS_AT_ONCE, combined, has_extension
from latentdiff.data.arrow.listing import ALONE, LISTING, TABLES
from latentdiff.data.arrow.parquet_rows import (
    batch_rows,
    bytes_column,
    bytes_of,
    open_parquet,
    place_of,
)
from latentdiff.data.arrow.scan_index import ScanIndex, settings_hash
from latentdiff.data.folder.caption_tables import METADATA_PATTERN, CaptionRules
from latentdiff.data.folder.problems import Problems
from latentdiff.data.image_tables.arrow_file import byte_places, open_arrow
from latentdiff.data.image_tables.table_columns import (
    TableColumns,
    UnusableTableError,
    captions_of,
    choose_columns,
)

STATE = "state.json"  # of save_to_disk: the names of a data set's arrow files
MAX_GROUP_BYTES = 256 << 20
# captions: at least one; null where the row, or the whole file, cannot be used.
IMAGE_ROWS = pa.schema(
    [
        *LISTING,
        pa.field("captions", CAPTIONS),
        pa.field("problem", pa.string()),
        pa.field("detail", pa.large_string()),
    ]
)
# What pyarrow raises on damaged files, found by feeding it damaged files.
TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError)


def read_image_tables(
    root: Path,
    listing: pa.Table,
    *,
    rules: CaptionRules,
    problems: Problems,
    index: ScanIndex | None = None,
) -> pa.Table:
    """Read the rows with images of all tables in a listing: LISTING and captions, sorted by path.

    Tables that `index` knows, all of them unchanged, are not read again.
    """
    paths = combined(listing["path"])
    is_table = has_extension(paths, TABLES) & ~_matches(paths, METADATA_PATTERN)
    states = _states(paths)
    if not is_table.any() and not states:
        return IMAGE_ROWS.empty_table().select(["path", "size", "mtime_ns", "offset", "captions"])
    files = listing.filter(pa.array(is_table)).select(["path", "size", "mtime_ns"]).to_pylist()
    files = _without_strays(root, files, states=states, problems=problems)
    settings = [rules.caption_column, rules.file_column, rules.missing_caption]
    name = f"tables-{settings_hash({'files': files, 'settings': settings})[:16]}"
    table = index.load(name, IMAGE_ROWS) if index is not None else None
    if table is None and index is not None:
        index.save(name, IMAGE_ROWS, parts=_all_rows(root, files, rules))
        index.prune("tables-")
        table = index.load(name, IMAGE_ROWS)
        if table is not None and pc.any(pc.equal(table["problem"], "unreadable")).as_py():
            index.path(name).unlink(missing_ok=True)
    if table is None:
        table = pa.concat_tables([IMAGE_ROWS.empty_table(), *_all_rows(root, files, rules)])
    found = table.filter(pc.is_valid(table["problem"])).select(["problem", "path", "detail"])
    for batch in found.to_batches(max_chunksize=OBJECTS_AT_ONCE):
        for row in batch.to_pylist():
            problems.add(row["problem"], row["path"], row["detail"] or "")
    good = table.filter(pc.is_valid(table["captions"])).drop_columns(["problem", "detail"])
    return good.sort_by("path").combine_chunks()


def _matches(paths: pa.Array, pattern: str) -> np.ndarray:
    found: np.ndarray = pc.match_substring_regex(paths, pattern).to_numpy(zero_copy_only=False)
    return found


def _states(paths: pa.Array) -> list[str]:
    """Name the folders with a state.json, each with its slash; "" for the root."""
    states = paths.filter(pa.array(_matches(paths, r"(^|/)state\.json$"))).to_pylist()
    return [path.removesuffix(STATE) for path in states]


def _without_strays(
    root: Path, files: list[dict[str, Any]], *, states: list[str], problems: Problems
) -> list[dict[str, Any]]:
    """Take out arrow files of `datasets` that belong to no data set: left from its own cache."""
    listed: dict[str, set[str] | None] = {}
    for folder in states:
        listed[folder] = names = _listed_in_state(root / folder / STATE)
        there = {file["path"].removeprefix(folder) for file in files}
        for name in sorted((names or set()) - there):
            problems.add("broken_table", f"{folder}{STATE}", f"names {name}, which is not there")
    kept = []
    for file in files:
        folder, _, name = file["path"].rpartition("/")
        known = listed.get(f"{folder}/" if folder else "")
        is_stray = name.startswith("cache-") if known is None else name not in known
        if name.lower().endswith(".arrow") and is_stray:
            problems.add("stray_table", file["path"])
        else:
            kept.append(file)
    return kept


def _listed_in_state(path: Path) -> set[str] | None:
    try:
        state = json.loads(path.read_bytes())
        names = {file["filename"] for file in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # a state.json of something else
    return names if all(isinstance(name, str) for name in names) else None


def _all_rows(root: Path, files: list[dict[str, Any]], rules: CaptionRules) -> Iterator[pa.Table]:
    for file in files:
        yield from _rows_of_file(root, file, rules)


def _rows_of_file(root: Path, file: dict[str, Any], rules: CaptionRules) -> Iterator[pa.Table]:
    """Yield the rows of one file, and one row for a problem of the whole file."""
    path, num_rows = file["path"], 0
    is_parquet = path.lower().endswith(".parquet")
    read = _parquet_rows if is_parquet else _arrow_rows
    try:
        for columns in read(root / path, rules):
            num = len(columns["captions"])
            names = [f"{path}/{row:08d}" for row in range(num_rows, num_rows + num)]
            yield (
                pa.table({"path": names, "mtime_ns": [file["mtime_ns"]] * num, **columns})
                .select(IMAGE_ROWS.names)
                .cast(IMAGE_ROWS)
            )
            num_rows += num
        if num_rows and is_parquet and (size := _largest_group(root / path)) > MAX_GROUP_BYTES:
            yield _problem(file, "large_row_groups", f"up to {size / 1e6:,.0f} MB")
    except UnusableTableError as error:
        yield _problem(file, error.key, error.detail)
    except PermissionError:
        yield _problem(file, "unreadable", "")
    except TABLE_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        yield _problem(file, "broken_table", f"after {num_rows:,} good rows: {reason}")


def _problem(file: dict[str, Any], key: str, detail: str) -> pa.Table:
    row = {**file, "offset": ALONE, "captions": None, "problem": key, "detail": detail}
    return pa.Table.from_pylist([row], schema=IMAGE_ROWS)


def _columns_of(schema: pa.Schema, rules: CaptionRules) -> TableColumns:
    columns = choose_columns(schema, rules)
    if columns is None:
        raise UnusableTableError("table_ignored", f"its columns: {', '.join(schema.names)}"[:300])
    return columns


def _parquet_rows(path: Path, rules: CaptionRules) -> Iterator[dict[str, Any]]:
    with open_parquet(path) as file:
        schema = file.schema_arrow
        chosen = _columns_of(schema, rules)
        wanted = [bytes_column(schema.field(chosen.image))]
        if chosen.caption is not None:
            wanted.append(schema.field(chosen.caption).name)
        start = 0
        for group in range(file.num_row_groups):
            batches = file.iter_batches(
                batch_size=batch_rows(file, group),
                row_groups=[group],
                columns=wanted,
                use_threads=False,
            )
            for batch in batches:
                data = bytes_of(batch.column(schema.field(chosen.image).name))
                at = [place_of(chosen.image, row) for row in range(start, start + len(batch))]
                start += len(batch)
                caption = None if chosen.caption is None else batch.column(wanted[1])
                yield _row_columns(data, np.array(at, np.int64), caption, chosen, rules)


def _largest_group(path: Path) -> int:
    """Return the bytes of a parquet file's largest row group."""
    with open_parquet(path) as file:
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        return max((group.total_byte_size for group in groups), default=0)


def _arrow_rows(path: Path, rules: CaptionRules) -> Iterator[dict[str, Any]]:
    with open_arrow(path) as arrow:
        chosen = _columns_of(arrow.schema, rules)
        for batch in arrow.batches():
            for start in range(0, len(batch), OBJECTS_AT_ONCE):
                part = batch.slice(start, OBJECTS_AT_ONCE)
                image = part.column(chosen.image)
                caption = None if chosen.caption is None else part.column(chosen.caption)
                image.validate(full=True)
                at = byte_places(image, arrow)
                yield _row_columns(bytes_of(image), at, caption, chosen, rules)


def _row_columns(
    data: pa.Array,
    at: np.ndarray,
    caption: pa.Array | None,
    chosen: TableColumns,
    rules: CaptionRules,
) -> dict[str, Any]:
    """Give the columns size, offset, captions, problem and detail of some rows."""
    if caption is None:
        caption = pa.nulls(len(data), pa.string())
    caption.validate(full=True)
    found = captions_of(caption, class_names=chosen.class_names, missing=rules.missing_caption)
    rows = list(found)
    for i in np.flatnonzero(data.is_null().to_numpy(zero_copy_only=False)):
        rows[int(i)] = (None, "no_image_bytes", None)
    captions, problem, detail = zip(*rows, strict=True) if rows else ((), (), ())
    return {
        "size": pc.fill_null(pc.binary_length(data), 0),
        "offset": at,
        "captions": pa.array(captions, CAPTIONS),
        "problem": pa.array(problem, pa.string()),
        "detail": pa.array(detail, pa.large_string()),
    }
