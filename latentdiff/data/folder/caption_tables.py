"""All caption tables of a folder together: which rows belong to which listed files."""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import CAPTIONS, StringIndex, find_names, in_chunks
from latentdiff.data.folder.metadata import read_metadata
from latentdiff.data.folder.problems import Problems

METADATA_PATTERN = r"(^|/)metadata\.(jsonl|csv|parquet)$"


ROWS = pa.schema(
    [("captions", CAPTIONS), ("file", pa.int32()), ("number", pa.int32()), ("table", pa.int16())]
)


@dataclass(frozen=True)
class CaptionRules:
    """How captions are found, and the policy for images with none or several."""

    caption_column: str = "text"  # of a table: texts, or lists of texts
    file_column: str = "file_name"  # of a table: paths relative to its folder
    caption_template: str = ""  # as "a photo of a {label}": else the folder's name is the label
    missing_caption: Literal["skip", "empty", "file_name", "folder_name"] = "skip"  # with none
    duplicate_rows: Literal["error", "captions"] = "error"  # an image listed twice
    sidecar_lines: Literal["one", "captions"] = "one"  # a text file is one caption, or one a line
    repeat_folders: bool = False  # the number in a folder's name, as in 10_dog, is no part of it


@dataclass
class CaptionTables:
    """The caption tables in use, and the folders (posix, relative) whose table cannot be used."""

    names: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def covers(self, folder: str) -> bool:
        """Return whether a table in use lies in `folder` or above it."""
        return any(is_below(folder, parent(name)) for name in self.names)

    def failed_above(self, folder: str) -> bool:
        return any(is_below(folder, failed) for failed in self.failed)


@dataclass
class Rows:
    """The rows of all tables, column by column.

    file: place among the listed paths, -1 for none; table: place in CaptionTables.names; missing:
    the paths of the rows without a file, in order.
    """

    captions: pa.ChunkedArray
    file: np.ndarray
    numbers: np.ndarray
    table: np.ndarray
    names: list[str]
    missing: list[str]

    def where(self, row: int) -> str:
        return f"{self.names[self.table[row]]}:{self.numbers[row]}"


def find_tables(paths: pa.Array, problems: Problems) -> CaptionTables:
    """Find the caption tables among the listed paths; two in one folder are a problem."""
    found = paths.filter(pc.match_substring_regex(paths, METADATA_PATTERN)).to_pylist()
    by_folder: dict[str, list[str]] = {}
    for name in found:
        by_folder.setdefault(parent(name), []).append(name)
    tables = CaptionTables()
    for folder, names in by_folder.items():
        if len(names) > 1:
            problems.add(
                "two_metadata", folder or ".", ", ".join(Path(name).name for name in names)
            )
            tables.failed.append(folder)
        else:
            tables.names += names
    return tables


def read_rows(
    root: Path, tables: CaptionTables, *, paths: pa.Array, rules: CaptionRules, problems: Problems
) -> Rows:
    """Read all tables, and find the listed paths that their rows name.

    A table without a single good row joins `tables.failed`.
    """
    listed, missing = StringIndex(paths), list[str]()
    parts = [ROWS.empty_table()]
    for place, name in enumerate(list(tables.names)):
        num_parts = len(parts)
        rows = read_metadata(
            root,
            name,
            caption_column=rules.caption_column,
            file_column=rules.file_column,
            problems=problems,
        )
        for chunk in in_chunks(rows):
            found = listed.find(pa.array([row.path for row in chunk], pa.large_string()))
            missing += [row.path for row, at in zip(chunk, found, strict=True) if at < 0]
            captions, numbers = [row.captions for row in chunk], [row.number for row in chunk]
            parts.append(pa.table([captions, found, numbers, [place] * len(chunk)], schema=ROWS))
        if len(parts) == num_parts:
            tables.failed.append(parent(name))
    del listed
    table = pa.concat_tables(parts)
    file, number, place_of = (table[name].to_numpy() for name in ROWS.names[1:])
    read = Rows(table["captions"], file, number, place_of, list(tables.names), missing)
    _find_composed(read, paths)
    return read


@dataclass(frozen=True)
class Match:
    """Each listed file's captions: (N,) places in Rows.captions followed by `merged`, or -1."""

    of_file: np.ndarray
    merged: pa.Array


def match_rows(rows: Rows, paths: pa.Array, *, rules: CaptionRules, problems: Problems) -> Match:
    """Join rows and listed files; a row without a file and a second row are problems."""
    _report_missing(rows, paths, problems)
    order = np.argsort(rows.file, kind="stable")[len(rows.missing) :].astype(np.int32)
    files = rows.file[order]
    starts = np.flatnonzero(np.diff(files, prepend=-1))
    files = files[starts]
    of_file = np.full(len(paths), -1, np.int32)
    of_file[files] = order[starts]  # a file's first row
    merged: list[list[str]] = []
    ends = np.append(starts[1:], len(order))
    for i in np.flatnonzero(ends - starts > 1):
        same = order[starts[i] : ends[i]]
        name = paths[int(files[i])].as_py()
        if _may_merge(rows, same, name=name, rules=rules, problems=problems):
            of_file[files[i]] = len(rows.captions) + len(merged)
            merged.append([text for row in same for text in rows.captions[int(row)].as_py()])
    return Match(of_file, pa.array(merged, CAPTIONS))


def _may_merge(
    rows: Rows, same: np.ndarray, *, name: str, rules: CaptionRules, problems: Problems
) -> bool:
    places = ", ".join(rows.where(int(row)) for row in same[:5])
    if len(set(rows.table[same])) > 1:
        problems.add("two_metadata", name, f"listed in {places}")
    elif rules.duplicate_rows == "error":
        problems.add("listed_twice", name, f"in {places}")
    else:
        return True
    return False


def _find_composed(rows: Rows, paths: pa.Array) -> None:
    """Find missing files under another Unicode composition; macOS has its own."""
    if not rows.missing:
        return
    found = find_names(pa.array(rows.missing, pa.large_string()), paths)
    rows.file[rows.file < 0] = found
    rows.missing = [name for name, at in zip(rows.missing, found, strict=True) if at < 0]


def _report_missing(rows: Rows, paths: pa.Array, problems: Problems) -> None:
    refused = {
        where
        for key in ("link_leaves", "link_broken", "not_a_file")
        if key in problems
        for where, _ in problems[key].examples
    }
    if not rows.missing:
        return
    names = pa.array(rows.missing, pa.large_string())
    lower = pc.replace_substring(pc.utf8_lower(names), "\\", "/")
    close = find_names(lower, pc.utf8_lower(paths))
    for name, row, place in zip(rows.missing, np.flatnonzero(rows.file < 0), close, strict=True):
        hint = f"; there is {paths[int(place)].as_py()}" if place >= 0 else ""
        key = "windows_path" if "\\" in name else "missing_file"
        if name not in refused:
            problems.add(key, rows.where(int(row)), f"{name}{hint}")


def parent(path: str) -> str:
    """Name a path's folder; "" for the root."""
    return path.rpartition("/")[0]


def is_below(folder: str, above: str) -> bool:
    """Return whether `folder` is `above` or lies somewhere below it."""
    return not above or folder == above or folder.startswith(above + "/")


def name_of(path: str) -> str:
    return PurePosixPath(path).name
