"""From files to a table of records: list, caption, scan, judge by size, split."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from latentdiff.data.arrow.columns import CAPTIONS, CHUNK, iter_py, release_memory, take_rows
from latentdiff.data.arrow.listing import Progress
from latentdiff.data.arrow.scan_index import ScanIndex, map_table, settings_hash, table_digest
from latentdiff.data.folder.caption_tables import CaptionRules
from latentdiff.data.folder.files import list_files
from latentdiff.data.folder.image_headers import read_image_headers
from latentdiff.data.folder.mask_files import FOUND, match_masks, no_masks, part_masks
from latentdiff.data.folder.match_captions import CaptionedFiles, match_captions
from latentdiff.data.folder.problems import Problems
from latentdiff.data.folder.shards import expand_shards
from latentdiff.data.folder.splits import assign_splits

RECORDS = pa.schema(
    [
        ("id", pa.large_string()),
        ("captions", CAPTIONS),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("split", pa.int8()),  # a place in splits.SPLITS
        ("size", pa.int64()),  # of the file, in bytes
        ("offset", pa.int64()),  # in its shard, or files.ALONE
        *FOUND,  # the mask file beside it, null where masks are not used
    ]
)


@dataclass(frozen=True)
class ReadRules:
    """What makes a record of a file; `folder.read_folder` documents each field."""

    captions: CaptionRules
    follow_links: bool
    heldout_fraction: float
    min_size: int
    max_aspect: float
    mask: str = "none"


@dataclass(frozen=True)
class RecordTable:
    """Usable records (columns of RECORDS, sorted by id), problems, and images there were."""

    table: pa.Table
    problems: Problems
    num_found: int
    stored_at: Path | None = None  # the arrow file that the table is mapped from


def build_record_table(
    root: Path,
    rules: ReadRules,
    *,
    index: ScanIndex | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> RecordTable:
    """Make the table of usable records.

    With an `index`, a folder whose files and rules are those of an earlier call is mapped from
    disk, and of another one only new and changed files are opened. `full` opens all of them and
    decodes every image.
    """
    problems = Problems()
    exclude = index.folder if index is not None else None
    listing = list_files(root, follow_links=rules.follow_links, problems=problems, exclude=exclude)
    release_memory()
    name = f"{_prefix(rules)}-{_caption_digest(listing, problems)}"
    if index is not None and not full and (earlier := map_records(index.path(name))):
        return earlier
    listing = expand_shards(root, listing, problems=problems, index=index, progress=progress)
    uses_masks = rules.mask == "file"
    listing, masks = part_masks(listing, are_used=uses_masks, problems=problems)
    images = match_captions(root, listing, rules=rules.captions, problems=problems, index=index)
    del listing
    release_memory()
    num_found = len(images) + problems.count("skipped")
    facts = read_image_headers(root, images.files, index=index, full=full, progress=progress)
    del images.files
    release_memory()
    kept = _refuse_by_size(facts, rules, problems)
    beside = None
    if uses_masks:
        kept, beside = match_masks(
            root,
            masks,
            facts,
            kept,
            problems=problems,
            index=index,
            full=full,
            progress=progress,
        )
    if not len(kept) and not problems.count("error") and not problems.count("skipped"):
        problems.add("no_images", str(root))
    parts = _records(images, facts, kept, beside, heldout_fraction=rules.heldout_fraction)
    if index is not None and not _may_get_better(problems):
        told = {"problems": json.dumps(problems.to_json()), "num_found": str(num_found)}
        index.save(name, RECORDS.with_metadata(told), parts)
        index.prune("records-")
        if stored := map_records(index.path(name)):
            return stored
        parts = _records(images, facts, kept, beside, heldout_fraction=rules.heldout_fraction)
    table = pa.concat_tables([RECORDS.empty_table(), *parts])
    return RecordTable(table, problems, num_found)


def last_records(rules: ReadRules, index: ScanIndex) -> RecordTable | None:
    """Map what the last `gather_records` with these rules found; None if nothing is kept."""
    name = index.newest(_prefix(rules))
    return map_records(index.path(name)) if name else None


def _records(
    images: CaptionedFiles,
    facts: pa.Table,
    kept: np.ndarray,
    beside: pa.Table | None,
    *,
    heldout_fraction: float,
) -> Iterator[pa.Table]:
    """Yield the table of records in parts, so that it never is in memory whole."""
    good = take_rows(facts.select(["path", "width", "height", "size", "offset"]), kept)
    splits = assign_splits(iter_py(good["path"]), heldout_fraction, num=len(good))
    for start in range(0, len(good), CHUNK):
        part = slice(start, start + CHUNK)
        path, width, height, size, offset = good.slice(start, CHUNK).combine_chunks().columns
        captions = images.pool.take(images.at[kept[part]])
        some = no_masks(len(path)) if beside is None else beside.slice(start, CHUNK)
        masks = some.combine_chunks().columns
        columns = [path, captions, width, height, pa.array(splits[part]), size, offset, *masks]
        yield pa.table(columns, schema=RECORDS).combine_chunks()
        release_memory()


def _refuse_by_size(facts: pa.Table, rules: ReadRules, problems: Problems) -> np.ndarray:
    """Find the rows to keep, and add a problem for each other one."""
    widths, heights = facts["width"].to_numpy(), facts["height"].to_numpy()
    shorter, longer = np.minimum(widths, heights), np.maximum(widths, heights)
    is_bad = facts["problem"].is_valid().to_numpy()
    is_thin = ~is_bad & (longer > rules.max_aspect * shorter)
    is_small = ~is_bad & ~is_thin & (shorter < rules.min_size)
    for i in np.flatnonzero(is_bad | is_small | is_thin | facts["note"].is_valid().to_numpy()):
        row = facts.slice(int(i), 1).to_pylist()[0]
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
            problems.add(row["note"], row["path"])
    return np.flatnonzero(~(is_bad | is_small | is_thin))


def _may_get_better(problems: Problems) -> bool:
    """Say whether a file could not be read this time: that is not to be remembered."""
    return "unreadable" in problems or "unreadable_folder" in problems


def map_records(path: Path) -> RecordTable | None:
    """Map records that `gather_records` stored; None where the file cannot be used."""
    table = map_table(path)
    if table is None or not table.schema.equals(RECORDS):
        return None
    meta = table.schema.metadata
    problems = Problems.from_json(json.loads(meta[b"problems"]))
    return RecordTable(table, problems, int(meta[b"num_found"]), path)


def _prefix(rules: ReadRules) -> str:
    return f"records-{settings_hash(asdict(rules))[:16]}"


def _caption_digest(listing: pa.Table, problems: Problems) -> str:
    seen = {"files": table_digest(listing), "problems": problems.to_json()}
    return settings_hash(seen)[:16]
