"""A captioned folder as a sequence of records, with every problem named.

Captions come from metadata.jsonl / .csv / .parquet (Hugging Face's imagefolder convention), from
.txt / .caption / .json files next to the images, or from the folders' names and a template. Tar
shards are read as folders of their members, and tables with images in them as folders of rows.
Splits come from train/, validation/ and test/ folders or from a stable hash of the id. Nothing
below `root` is ever written.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import (
    CAPTIONS,
    CHUNK_ROWS,
    combined,
    iter_py,
)
from latentdiff.data.arrow.listing import LISTING, TABLES, Entry, Progress, read_entry
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.folder.caption_tables import CaptionRules
from latentdiff.data.folder.files import existing_path
from latentdiff.data.folder.folder_names import SPLITS, Split, like_heldout
from latentdiff.data.folder.join_records import SourceTable, join_records
from latentdiff.data.folder.record_table import (
    RECORDS,
    ReadRules,
    RecordTable,
    build_record_table,
    last_records,
    map_records,
)
from latentdiff.data.folder.shards import ARCHIVES
from latentdiff.data.image_tables.hub_dataset import open_hub_dataset, parse_hub_id
from latentdiff.program import program

logger = logging.getLogger(__name__)

FILES = pa.schema([field for field in LISTING if field.name != "mtime_ns"])
FILE_COLUMNS = ("id", "size", "offset")  # of RECORDS, as in FILES
COMPANION_ENDS = ("", "_size", "_offset")  # of the names of a companion's columns


@dataclass(frozen=True)
class Record:
    """One captioned image.

    id: posix path relative to the folder, for a shard's member shard.tar/name, for a table's row
    FILE.parquet/00000012; path: the folder and the id, which opens only where there are neither
    (`Folder.read_bytes` always does); captions: at least one; width, height: pixels as the image
    is seen, that is, after its EXIF orientation.
    """

    id: str
    path: Path
    captions: tuple[str, ...]
    width: int
    height: int
    split: Split
    source: int = 0  # which of several, counted from 0


Companion = Literal["condition", "inpaint_mask"]


class Folder(Sequence[Record]):
    """The usable records of a captioned folder, sorted by id, and what is wrong with the rest.

    Records are made one at a time from a table, mapped from disk where there is a scan index; a
    million of them take no more memory than the pages of the table that are in use.
    """

    def __init__(
        self, root: Path, found: RecordTable, *, rows: np.ndarray | None = None, name: str = ""
    ) -> None:
        """rows: which records of the table, in which order; all by default.

        name: by which messages call the folder, as the id of a data set; by default its path.
        """
        self.root, self.name = root, name or str(root)
        self.problems = found.problems
        self.num_found = found.num_found  # usable or not, but for those skipped on purpose
        self._found = found
        self._columns = [found.table[name] for name in RECORDS.names]
        self._rows = np.arange(len(found.table), dtype=np.int32) if rows is None else rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Send a mapped table to another process by its file's name, not by its contents."""
        stored_at = self._found.stored_at
        return _reopen, (self.root, stored_at or self._found, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Folder": ...
    def __getitem__(self, index: int | slice) -> "Record | Folder":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = int(self._rows[index])
        name, captions, width, height, split = (c[row].as_py() for c in self._columns[:5])
        source = self._column("source")[row].as_py()
        where = self.root / name
        return Record(name, where, tuple(captions), width, height, SPLITS[split], source)

    def read_bytes(self, index: int) -> bytes:
        """Read the image file of record `index` as it is on disk or in its shard."""
        return read_entry(self.root, self._entry(int(self._rows[index])))

    def read_bytes_of(self, record_id: str) -> bytes:
        """Read the image file of the record of that id. Raises KeyError if there is none."""
        row = pc.index(self._columns[0], record_id).as_py()
        if row < 0:
            raise KeyError(record_id)
        return read_entry(self.root, self._entry(row))

    def read_mask(self, index: int) -> bytes:
        """Read the mask file next to the image of record `index`, with mask="file" only."""
        return read_entry(self.root, self._companions("mask", int(self._rows[index]))[0])

    def mask_files(self) -> pa.Table:
        """Return where each record's mask file is, with mask="file" only, as `files` does."""
        names = [f"mask{end}" for end in COMPANION_ENDS]
        first = [pc.list_element(column, 0) for column in self._taken(names)]
        return pa.table(first, schema=FILES)

    def companions(self, name: Companion) -> tuple["Folder", np.ndarray]:
        """Return the records' conditions or inpainting masks, and (N + 1,) where each's begin.

        They are a folder of their own, in the order of the records and of each one's list; all but
        their names and files is that of their image, width and height too.
        """
        lists = self._taken([f"{name}{end}" for end in COMPANION_ENDS])
        counts = pc.list_value_length(lists[0]).fill_null(0).to_numpy(zero_copy_only=False)
        table = self._found.table.take(pa.array(np.repeat(self._rows, counts)))
        for column, values in zip(FILE_COLUMNS, lists, strict=True):
            table = table.set_column(RECORDS.names.index(column), column, values.flatten())
        found = replace(self._found, table=table, stored_at=None)
        return Folder(self.root, found), np.concatenate([[0], np.cumsum(counts)])

    def files(self) -> pa.Table:
        """Return where each record's file is: rows of FILES."""
        return pa.table(self._taken(FILE_COLUMNS), schema=FILES)

    @property
    def ids(self) -> pa.Array:
        """The records' ids as an arrow array of (N,) texts."""
        return self._taken(["id"])[0]

    @property
    def captions(self) -> pa.Array:
        """The records' captions as an arrow array of (N,) lists of texts."""
        return self._taken(["captions"])[0]

    def each_caption(self) -> Iterator[str]:
        """Yield every caption of every record in turn, with a part of them in memory at a time."""
        for start in range(0, len(self), CHUNK_ROWS):
            yield from iter_py(self[start : start + CHUNK_ROWS].captions.flatten())

    @property
    def splits(self) -> np.ndarray:
        """(N,) int8 places in splits.SPLITS."""
        return self._numbers("split")

    @property
    def repeats(self) -> np.ndarray:
        """(N,) int32: how often an epoch shows each record; 1 without repeats."""
        return self._numbers("repeats")

    @property
    def sources(self) -> np.ndarray:
        """(N,) int16: which of several sources each record is of, counted from 0."""
        return self._numbers("source")

    @property
    def widths(self) -> np.ndarray:
        """(N,) int32 pixels."""
        return self._numbers("width")

    @property
    def heights(self) -> np.ndarray:
        """(N,) int32 pixels."""
        return self._numbers("height")

    def select(self, indices: np.ndarray) -> "Folder":
        """The records at `indices`, in that order; the problems stay those of the whole folder."""
        return Folder(self.root, self._found, rows=self._rows[indices], name=self.name)

    def with_captions(self, captions: Sequence[str]) -> "Folder":
        """The same records, each with these captions instead of its own."""
        table = self._found.table
        column = pa.array([list(captions)] * len(table), type=CAPTIONS)
        table = table.set_column(RECORDS.names.index("captions"), "captions", column)
        found = replace(self._found, table=table, stored_at=None)
        return Folder(self.root, found, rows=self._rows, name=self.name)

    def split(self, name: Split) -> "Folder":
        """The records of one split: "train", "validation" or "test"."""
        return self.select(np.flatnonzero(self.splits == SPLITS.index(name)))

    def heldout(self) -> "Folder":
        """The validation records, or the test records of a source without any; may be empty."""
        splits, sources = self.splits, self.sources
        is_held = splits == SPLITS.index("validation")
        for source in np.unique(sources):
            is_own = sources == source
            if not (is_own & is_held).any():
                is_held |= is_own & (splits == SPLITS.index("test"))
        return self.select(np.flatnonzero(is_held))

    def by_source(self) -> Iterator["Folder"]:
        """Yield the records of each source in turn, up to the last one that has any here."""
        sources = self.sources
        for source in range(int(sources.max(initial=-1)) + 1):
            yield self.select(np.flatnonzero(sources == source))

    @property
    def invalid_fraction(self) -> float:
        """Skipped images over images found, in [0, 1]."""
        return self.problems.count("skipped") / max(1, self.num_found)

    def refusals(self, *, max_invalid_fraction: float = 0.0) -> list[str]:
        """List in a line each why the folder may not be trained on; empty if it may.

        max_invalid_fraction: share of the images found that may be skipped, in [0, 1].
        """
        lines = [group.headline for group in self.problems.groups("error")]
        if self.invalid_fraction > max_invalid_fraction:
            lines.append(
                f"{self.problems.count('skipped'):,} of {self.num_found:,} images "
                f"({self.invalid_fraction:.1%}) are skipped, more than "
                f"data.max_invalid_fraction={max_invalid_fraction:g} allows"
            )
        return lines

    def check(self, *, max_invalid_fraction: float = 0.0) -> None:
        """Raise ValueError with every problem and its fix, if there are `refusals`."""
        if not self.refusals(max_invalid_fraction=max_invalid_fraction):
            return
        lines = [f"the data folder {self.name} cannot be used:"]
        lines += [f"  {group.line()}" for group in self.problems.groups("error")]
        if self.invalid_fraction > max_invalid_fraction:
            lines.append(f"  {self.refusals(max_invalid_fraction=max_invalid_fraction)[-1]}:")
            lines += [f"    {group.line()}" for group in self.problems.groups("skipped")]
        lines.append(f"  {program()} inspect {self.name} shows everything")
        raise ValueError("\n".join(lines))

    def _entry(self, row: int) -> Entry:
        name, size, offset = (self._column(one)[row].as_py() for one in FILE_COLUMNS)
        return Entry(name, size, offset)

    def _companions(self, name: str, row: int) -> list[Entry]:
        columns = (self._column(f"{name}{end}")[row].as_py() for end in COMPANION_ENDS)
        return [Entry(*one) for one in zip(*(part or [] for part in columns), strict=True)]

    def _column(self, name: str) -> pa.ChunkedArray:
        return self._columns[RECORDS.names.index(name)]

    def _taken(self, names: Sequence[str]) -> list[pa.Array]:
        """Take the records' rows of some columns."""
        rows = pa.array(self._rows)
        return [combined(self._column(name).take(rows)) for name in names]

    def _numbers(self, name: str) -> np.ndarray:
        column: np.ndarray = self._column(name).to_numpy()
        return np.take(column, self._rows)


def read_folder(
    root: Path | str,
    *,
    caption_column: str = "text",
    file_column: str = "file_name",
    caption_template: str = "",
    missing_caption: Literal["skip", "empty", "file_name", "folder_name"] = "skip",
    repeat_folders: bool = False,
    duplicate_rows: Literal["error", "captions"] = "error",
    sidecar_lines: Literal["one", "captions"] = "one",
    follow_links: bool = False,
    heldout_fraction: float = 0.0,
    min_size: int = 1,
    max_aspect: float = 4.0,
    mask: Literal["none", "alpha", "file"] = "none",
    condition: Literal["none", "size", "aspect"] = "none",
    condition_column: str = "condition",
    inpaint_mask: Literal["none", "file"] = "none",
    inpaint_mask_column: str = "inpaint_mask",
    cache_dir: Path | str | None = None,
    full: bool = False,
    trust_index: bool = False,
    progress: Progress | None = None,
) -> Folder:
    """Read a captioned folder; headers only, unless `full`, which decodes every image again.

    root: a folder, or the id of a data set of the Hugging Face Hub, as hub_dataset.py reads it.
    cache_dir: of the scan index, by which the next call opens only files that changed. trust_index:
    take the last scan with these settings without a look at the files, for processes that start
    later. The other settings: CaptionRules, ReadRules. Raises ValueError for a setting,
    FileNotFoundError or NotADirectoryError for `root`; other problems are in the result.
    """
    captions = CaptionRules(
        caption_column=caption_column,
        file_column=file_column,
        caption_template=caption_template,
        missing_caption=missing_caption,
        duplicate_rows=duplicate_rows,
        sidecar_lines=sidecar_lines,
        repeat_folders=repeat_folders,
    )
    hub, name = parse_hub_id(root), str(root)
    if hub is not None:
        root, captions = open_hub_dataset(hub, captions, trust_index=trust_index)
    root = checked_root(root)
    rules = ReadRules(
        captions,
        follow_links,
        heldout_fraction,
        min_size,
        max_aspect,
        mask,
        condition,
        condition_column,
        inpaint_mask,
        inpaint_mask_column,
    )
    index = ScanIndex(cache_dir, root) if cache_dir is not None else None
    found = last_records(rules, index) if trust_index and index is not None else None
    if found is None:
        _warn_of_splits(root)
        found = build_record_table(root, rules, index=index, full=full, progress=progress)
    return Folder(root, found, name=name if hub is not None else "")


def _warn_of_splits(root: Path) -> None:
    """Log a warning of folders that look like a held-out split and are trained on."""
    _, folders, _ = next(os.walk(root), ("", [], []))  # no look at each of many files
    if found := sorted(f"{name}/" for name in folders if like_heldout(name)):
        logger.warning(
            "%s: %s read as training images: a split's folder is named train, validation or test; "
            "rename %s, or give the folder of the training images alone",
            root,
            f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'}",
            "it" if len(found) == 1 else "them",
        )


def join_folders(
    folders: Sequence[Folder], *, repeats: Sequence[int], cache_dir: Path | str | None = None
) -> Folder:
    """Join the folders of several sources to one, in their order; its root is above them all.

    repeats: how often an epoch shows each source's images. cache_dir: where the joined table is
    kept, so that it need not be in memory. Raises ValueError where one is in another.
    """
    parts = [SourceTable(f.root, f._found, num) for f, num in zip(folders, repeats, strict=True)]
    return Folder(*join_records(parts, cache_dir=cache_dir))


def _reopen(root: Path, found: RecordTable | Path, rows: np.ndarray) -> Folder:
    opened = map_records(found) if isinstance(found, Path) else found
    if opened is None:
        raise FileNotFoundError(f"the scan index {found} is gone; start again to build it anew")
    return Folder(root, opened, rows=rows)


def checked_root(root: Path | str) -> Path:
    """Return the folder of a data set that is on this machine, as it is spelt on the disk.

    Raises FileNotFoundError, NotADirectoryError or ValueError where there is none.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:(//)?", str(root)) and not Path(root).expanduser().exists():
        raise ValueError(f"data.root={root}: only local folders are read; fetch the files first")
    root = existing_path(Path(root).expanduser())
    if not root.exists():
        raise FileNotFoundError(f"the data folder {root} does not exist; check --data.root")
    if not root.is_dir():
        fix = "--data.root must be a folder of images"
        if root.name.lower().endswith((".tar", *TABLES)):
            fix = f"give its folder, --data.root={root.parent}"
        elif root.name.lower().endswith(ARCHIVES):
            fix = "unpack it (as with unzip NAME.zip -d FOLDER), and give that folder"
        raise NotADirectoryError(f"{root} is a file; {fix}")
    return root
