"""From files to a table of records: list, caption, read headers, check sizes, split.

Ours, as is all of folder/: the imagefolder reader of `datasets` stops at the first fault and does
not check the images; here every fault is named, and only changed files are read again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from latentdiff.data.arrow.columns import (
    CAPTIONS,
    CHUNK_ROWS,
    combined,
    iter_py,
    release_memory,
    system_memory,
    take_rows,
)
from latentdiff.data.arrow.listing import Progress
from latentdiff.data.arrow.scan_index import ScanIndex, map_table, settings_hash, table_digest
from latentdiff.data.folder.by_products import without_runs
from latentdiff.data.folder.caption_tables import CaptionRules
from latentdiff.data.folder.companion_files import (
    EXTENSIONS,
    CompanionRule,
    Companions,
    Fit,
    companion_fields,
    find_companions,
    match_companions,
    no_companions,
    without_companions,
)
from latentdiff.data.folder.files import list_files, report_same_names
from latentdiff.data.folder.folder_names import assign_splits, count_repeats
from latentdiff.data.folder.match_captions import CaptionedFiles, match_captions
from latentdiff.data.folder.problems import Problems
from latentdiff.data.folder.shards import expand_shards
from latentdiff.data.image_headers import read_image_headers
from latentdiff.data.image_tables.table_folder import read_image_tables

RECORDS_VERSION = 5  # raise it when the same files give other records
RECORDS = pa.schema(
    [
        ("id", pa.large_string()),
        ("captions", CAPTIONS),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("split", pa.int8()),  # a place in splits.SPLITS
        ("size", pa.int64()),  # of the file, in bytes
        ("offset", pa.int64()),  # in its shard, or files.ALONE
        ("repeats", pa.int32()),  # in an epoch of training
        ("source", pa.int16()),  # of several, counted from 0
        # the files that belong to it, null where their kind is not used
        *companion_fields("mask"),
        *companion_fields("condition"),
        *companion_fields("inpaint_mask"),
    ]
)


@dataclass(frozen=True)
class ReadRules:
    """Which files become records."""

    captions: CaptionRules
    follow_links: bool  # also those that leave the folder
    heldout_fraction: float  # in [0, 1), held out by hash where no folder is named for a split
    min_size: int  # pixels of the shorter side
    max_aspect: float  # longer side over shorter side
    mask: str = "none"  # "file" wants NAME.mask.png next to NAME.jpg, and skips images without
    condition: Literal["none"] | Fit = "none"  # wants conditions that fit so, and skips as mask
    condition_column: str = "condition"  # of a caption table: paths as in the file column
    inpaint_mask: Literal["none", "file"] = "none"  # as mask
    inpaint_mask_column: str = "inpaint_mask"

    def companions(self) -> list[CompanionRule]:
        """List the kinds of files that every image is to have."""
        rules = [CompanionRule("mask")] if self.mask == "file" else []
        if self.condition != "none":
            rules.append(CompanionRule("condition", self.condition_column, self.condition))
        if self.inpaint_mask == "file":
            rules.append(CompanionRule("inpaint_mask", self.inpaint_mask_column))
        return rules

    def __post_init__(self) -> None:
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(
                f"data.heldout_fraction must be in [0, 1), got {self.heldout_fraction}"
            )
        if not self.max_aspect >= 1.0:
            raise ValueError(f"data.max_aspect must be at least 1, got {self.max_aspect}")
        template = self.captions.caption_template
        if template and "{label}" not in template:
            raise ValueError(
                f"data.caption_template must have {{label}} where the label goes, got {template!r}"
            )


@dataclass(frozen=True)
class RecordTable:
    """Usable records (columns of RECORDS, sorted by id), problems, and number of images found."""

    table: pa.Table
    problems: Problems
    num_found: int
    stored_at: Path | None = None  # the arrow file that the table is mapped from


@system_memory()
def build_record_table(
    root: Path,
    rules: ReadRules,
    *,
    index: ScanIndex | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> RecordTable:
    """Make the table of usable records.

    With an `index`, a folder with the files and rules of an earlier call is mapped from disk, and
    of another folder only changed files are opened. `full` opens and decodes every image.
    """
    problems = Problems()
    exclude = index.folder if index is not None else None
    listing = list_files(root, follow_links=rules.follow_links, problems=problems, exclude=exclude)
    release_memory()
    name = f"{_prefix(rules)}-{_listing_hash(listing, problems)}"
    if index is not None and not full and (earlier := map_records(index.path(name))):
        index.touch(name)
        return earlier
    listing = without_runs(listing, problems)
    listing = expand_shards(root, listing, problems=problems, index=index, progress=progress)
    report_same_names(combined(listing["path"]), problems)
    listing, companions = _separate_companions(root, listing, rules, problems)
    tables = read_image_tables(root, listing, rules=rules.captions, problems=problems, index=index)
    images = match_captions(
        root,
        listing,
        tables=tables,
        rules=rules.captions,
        problems=problems,
        index=index,
        companions=[combined(one.files["path"]) for one in companions],
    )
    del listing, tables
    release_memory()
    num_found = len(images) + problems.count("skipped")
    read_headers = partial(read_image_headers, root, index=index, full=full, progress=progress)
    headers = read_headers(images.files)
    del images.files
    release_memory()
    kept, rows = _refuse_by_size(headers, rules, problems=problems), dict[str, pa.Table]()
    for one in companions:
        files = read_headers(one.files, name=f"{one.rule.name}s")
        left, found = match_companions(headers, one, files, kept=kept, problems=problems)
        at = np.searchsorted(kept, left)
        rows = {name: take_rows(table, at) for name, table in rows.items()}
        kept, rows = left, rows | {one.rule.name: found}
    if not len(kept) and not problems.count("error") and not problems.count("skipped"):
        problems.add("no_images", str(root), _instead_of_images(problems))
    parts = partial(_records, images, headers, kept=kept, companions=rows, rules=rules)
    return _stored(parts, problems, num_found=num_found, index=index, name=name)


def _separate_companions(
    root: Path, listing: pa.Table, rules: ReadRules, problems: Problems
) -> tuple[pa.Table, list[Companions]]:
    """Take the companions that the rules ask for, by their names, out of a listing."""
    column = rules.captions.file_column
    found = [
        find_companions(root, listing, rule, file_column=column, problems=problems)
        for rule in rules.companions()
    ]
    for one in found:
        listing = without_companions(listing, one)
    return listing, found


def _instead_of_images(problems: Problems) -> str:
    """Describe the files that a person may have meant as images, where there is none."""
    keys = (
        *("archive", "table_ignored", "stray_table", "by_product", "unread_image"),
        *("stray_mask", "stray_condition", "stray_inpaint_mask", "other_files"),
    )
    there = [problems[key].line() for key in keys if key in problems]
    return "; ".join(there) or "check the path"


def _stored(
    parts: Callable[[], Iterator[pa.Table]],
    problems: Problems,
    *,
    num_found: int,
    index: ScanIndex | None,
    name: str,
) -> RecordTable:
    """Save the records to the index and map them from there; hold them where that fails."""
    if index is not None and not _may_get_better(problems):
        metadata = {"problems": json.dumps(problems.to_json()), "num_found": str(num_found)}
        index.save(name, RECORDS.with_metadata(metadata), parts=parts())
        index.prune("records-")
        if stored := map_records(index.path(name)):
            return stored
    table = pa.concat_tables([RECORDS.empty_table(), *parts()])
    return RecordTable(table, problems, num_found)


def last_records(rules: ReadRules, index: ScanIndex) -> RecordTable | None:
    """Map what the last `build_record_table` with these rules found; None if nothing is kept."""
    name = index.newest(_prefix(rules))
    return map_records(index.path(name)) if name else None


def _records(
    images: CaptionedFiles,
    headers: pa.Table,
    *,
    kept: np.ndarray,
    companions: Mapping[str, pa.Table],
    rules: ReadRules,
) -> Iterator[pa.Table]:
    """Yield the table of records in parts, so that it never is in memory whole."""
    good = take_rows(headers.select(["path", "width", "height", "size", "offset"]), kept)
    counts_repeats = rules.captions.repeat_folders
    splits = assign_splits(iter_py(good["path"]), rules.heldout_fraction, num=len(good))
    for start in range(0, len(good), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        path, width, height, size, offset = good.slice(start, CHUNK_ROWS).combine_chunks().columns
        captions = images.pool.take(images.at[kept[part]])
        repeats = count_repeats(combined(path)) if counts_repeats else np.ones(len(path), np.int32)
        columns = [path, captions, width, height, pa.array(splits[part]), size, offset]
        columns += [pa.array(repeats), pa.array(np.zeros(len(path), np.int16))]
        for name in EXTENSIONS:
            found = companions.get(name)
            some = (
                no_companions(len(path), name) if found is None else found.slice(start, CHUNK_ROWS)
            )
            columns += some.combine_chunks().columns
        yield pa.table(columns, schema=RECORDS).combine_chunks()
        release_memory()


def _refuse_by_size(headers: pa.Table, rules: ReadRules, *, problems: Problems) -> np.ndarray:
    """Find the rows to keep, and add a problem for each other row."""
    widths, heights = headers["width"].to_numpy(), headers["height"].to_numpy()
    shorter, longer = np.minimum(widths, heights), np.maximum(widths, heights)
    is_bad = headers["problem"].is_valid().to_numpy()
    is_thin = ~is_bad & (longer > rules.max_aspect * shorter)
    is_small = ~is_bad & ~is_thin & (shorter < rules.min_size)
    for i in np.flatnonzero(is_bad | is_small | is_thin | headers["note"].is_valid().to_numpy()):
        row = headers.slice(int(i), 1).to_pylist()[0]
        size = f"{row['width']} x {row['height']}"
        if is_bad[i]:
            problems.add(row["problem"], row["path"], row["detail"])
        elif is_small[i]:
            problems.add("too_small", row["path"], f"{size}, data.min_size={rules.min_size}")
        elif is_thin[i]:
            problems.add(
                "aspect_ratio", row["path"], f"{size}, data.max_aspect={rules.max_aspect:g}"
            )
        else:
            for note in row["note"].split(","):
                detail = row["detail"] if note == "broken_profile" else ""
                problems.add(note, row["path"], detail)
    return np.flatnonzero(~(is_bad | is_small | is_thin))


def _may_get_better(problems: Problems) -> bool:
    """Return whether a file could not be read this time, which the index must not remember."""
    return "unreadable" in problems or "unreadable_folder" in problems


def map_records(path: Path) -> RecordTable | None:
    """Map records that `build_record_table` stored; None where the file cannot be used."""
    table = map_table(path)
    if table is None or not table.schema.equals(RECORDS):
        return None
    meta = table.schema.metadata
    try:
        problems = Problems.from_json(json.loads(meta[b"problems"]))
        return RecordTable(table, problems, int(meta[b"num_found"]), path)
    except (AttributeError, KeyError, TypeError, ValueError):  # not as it was stored
        return None


def _prefix(rules: ReadRules) -> str:
    settings = asdict(rules)
    settings["split_fraction"] = settings.pop("heldout_fraction")  # as in an index of any version
    if not rules.captions.repeat_folders:  # as in an index of any version
        del settings["captions"]["repeat_folders"]
    for kind in ("condition", "inpaint_mask"):
        column = settings.pop(f"{kind}_column")
        if settings[kind] == "none":
            del settings[kind]
        else:
            settings[f"{kind}_column"] = column
    settings["version"] = RECORDS_VERSION
    return f"records-{settings_hash(settings)[:16]}"


def _listing_hash(listing: pa.Table, problems: Problems) -> str:
    seen = {"files": table_digest(listing), "problems": problems.to_json()}
    return settings_hash(seen)[:16]
