"""Each image's captions: tables, sidecar files and folder names joined."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import (
    CAPTIONS,
    combined,
    find_strings,
    has_extension,
    iter_py,
    release_memory,
    take_rows,
)
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.captions import file_name_caption, label_caption
from latentdiff.data.folder.by_products import (
    find_by_products,
    find_unread,
    report_other_files,
)
from latentdiff.data.folder.caption_tables import (
    CaptionRules,
    CaptionTables,
    find_tables,
    match_rows,
    name_of,
    parent,
    read_rows,
)
from latentdiff.data.folder.companion_files import (
    belongs_to_image,
    is_companion_name,
    kind_of_name,
)
from latentdiff.data.folder.files import METADATA_NAMES, TEXT_EXTENSIONS
from latentdiff.data.folder.folder_names import FOLDER_NAMES, count_repeats, repeat_folder
from latentdiff.data.folder.problems import Problems
from latentdiff.data.folder.sidecars import FAILED, NONE, read_sidecars
from latentdiff.image_io import IMAGE_EXTENSIONS

TABLE_LIKE = re.compile(r"\.(jsonl?|jsonlines|csv|tsv|parquet)$", re.IGNORECASE)


@dataclass
class CaptionedFiles:
    """Images (columns of LISTING) and the place of each one's captions in the pool.

    at: (N,) int32; NONE where none is found yet, FAILED where it cannot be used.
    """

    files: pa.Table
    at: np.ndarray
    pool: "CaptionPool"

    @property
    def paths(self) -> pa.Array:
        return combined(self.files["path"])

    def __len__(self) -> int:
        return len(self.files)


class CaptionPool:
    """Captions of images in arrow chunks, counted through."""

    def __init__(self, chunks: Sequence[pa.Array]) -> None:
        self._chunks = list(chunks)
        self._ends = np.cumsum([len(chunk) for chunk in chunks])

    def extend(self, captions: pa.Array) -> int:
        """Add captions and give the place of the first."""
        start = int(self._ends[-1])
        self._chunks.append(captions)
        self._ends = np.append(self._ends, start + len(captions))
        return start

    def take(self, places: np.ndarray) -> pa.Array:
        """Take the captions at some places, (N,) lists of texts.

        Chunk by chunk: arrow's own take from many chunks makes one of them all first.
        """
        chunk_of = np.searchsorted(self._ends, places, side="right")
        order = np.argsort(chunk_of, kind="stable")
        parts = [pa.array([], CAPTIONS)]
        for number in np.unique(chunk_of):
            chunk = self._chunks[number]
            within = places[chunk_of == number] - (self._ends[number] - len(chunk))
            parts.append(chunk.take(pa.array(within)))
        return pa.concat_arrays(parts).take(pa.array(np.argsort(order)))


def match_captions(
    root: Path,
    listing: pa.Table,
    *,
    tables: pa.Table,
    rules: CaptionRules,
    problems: Problems,
    index: ScanIndex | None = None,
    companions: Sequence[pa.Array] = (),
) -> CaptionedFiles:
    """Find the captions of all images in a listing; in the result every place is found.

    tables: images of tables, with their captions, which join the others; next to them an image
    without a caption of its own is a by-product. companions: paths of files that belong to images.

    A row of a caption table comes first, then a sidecar, then the folder's name, then the policy
    for none at all. Images without a caption are skipped, as are companions of an image without
    a row and by-products without a caption, and every problem met is added.
    """
    paths = combined(listing["path"])
    captions = find_tables(paths, problems)
    found = _from_tables(root, listing, captions, rules=rules, problems=problems)
    _skip_companions(found, problems, used=companions)
    _skip_unread_copies(found, problems)
    _add_sidecars(found, listing, root=root, rules=rules, problems=problems, index=index)
    _skip_by_products(found, problems, all_others=len(tables) > 0)
    _add_folder_names(found, captions, rules=rules)
    _report_uncaptioned(found, paths, tables=captions, rules=rules, problems=problems)
    captioned = np.flatnonzero(found.at >= 0).astype(np.int32)
    images = CaptionedFiles(take_rows(found.files, captioned), found.at[captioned], found.pool)
    images = _joined(images, tables) if len(tables) else images
    if rules.repeat_folders:
        _skip_zero_repeats(images, problems)
    return images


def _from_tables(
    root: Path,
    listing: pa.Table,
    tables: CaptionTables,
    *,
    rules: CaptionRules,
    problems: Problems,
) -> CaptionedFiles:
    """Find all images, and the captions of those that have a row."""
    paths = combined(listing["path"])
    rows = read_rows(root, tables, paths=paths, rules=rules, problems=problems)
    release_memory()
    match = match_rows(rows, paths, rules=rules, problems=problems)
    is_image = has_extension(paths, IMAGE_EXTENSIONS) | (match.of_file >= 0)
    report_other_files(paths.filter(pa.array(~is_image)), problems)
    places = np.flatnonzero(is_image)
    at = match.of_file[places]
    at[at < 0] = NONE
    release_memory()
    return CaptionedFiles(
        take_rows(listing, places), at, CaptionPool([*rows.captions.chunks, match.merged])
    )


def _skip_companions(
    found: CaptionedFiles, problems: Problems, *, used: Sequence[pa.Array]
) -> None:
    """Take out what belongs to an image and has no row: masks, conditions, used or not."""
    paths, wanting = found.paths, found.at == NONE
    by_name = np.flatnonzero(is_companion_name(paths) & wanting)
    by_name = by_name[belongs_to_image(paths.take(pa.array(by_name)), paths)]
    is_used = np.zeros(len(paths), bool)
    for names in used:
        is_used |= find_strings(paths, names) >= 0
    named = np.flatnonzero(is_used & wanting)
    for name in iter_py(paths, np.setdiff1d(by_name, named)):
        problems.add(f"unused_{kind_of_name(name)}", name)
    if len(skipped := np.union1d(by_name, named)):
        kept = np.setdiff1d(np.arange(len(found)), skipped)
        found.files, found.at = take_rows(found.files, kept), found.at[kept]


def _skip_unread_copies(found: CaptionedFiles, problems: Problems) -> None:
    """Take out the files that cannot be read, next to an image of their name: RAW and JPEG."""
    paths = found.paths
    unread = find_unread(paths, among=np.flatnonzero(found.at == NONE), next_to_copy=True)
    if len(unread):
        for name in iter_py(paths, unread):
            problems.add("unread_image", name)
        kept = np.setdiff1d(np.arange(len(found)), unread)
        found.files, found.at = take_rows(found.files, kept), found.at[kept]


def _joined(images: CaptionedFiles, tables: pa.Table) -> CaptionedFiles:
    """Join the images of tables with the others, sorted by path."""
    start = images.pool.extend(combined(tables["captions"]))
    files = pa.concat_tables([images.files, tables.drop_columns(["captions"])])
    at = np.concatenate([images.at, np.arange(start, start + len(tables))]).astype(np.int32)
    order = pc.sort_indices(files["path"]).to_numpy() if len(images) else np.arange(len(files))
    return CaptionedFiles(take_rows(files, order), at[order], images.pool)


def _skip_zero_repeats(images: CaptionedFiles, problems: Problems) -> None:
    """Take out the images of folders such as 0_dog."""
    repeats = count_repeats(images.paths)
    for name in iter_py(images.paths, np.flatnonzero(repeats == 0)):
        problems.add("zero_repeats", name)
    kept = np.flatnonzero(repeats)
    images.files, images.at = take_rows(images.files, kept), images.at[kept]


def _skip_by_products(found: CaptionedFiles, problems: Problems, *, all_others: bool) -> None:
    """Skip by-products, companions without an image and kinds that are not read, where they have no
    caption of their own.

    all_others: every other image without a caption is a by-product too.
    """
    paths, wanting = found.paths, np.flatnonzero(found.at == NONE)
    strays = wanting[is_companion_name(paths.take(pa.array(wanting)))]
    others = np.setdiff1d(wanting, strays)
    by_products = others if all_others else find_by_products(paths, among=others)
    unread = find_unread(paths, among=np.setdiff1d(others, by_products))
    for name in iter_py(paths, strays):
        problems.add(f"stray_{kind_of_name(name)}", name)
    found.at[strays] = FAILED
    for key, places in {"by_product": by_products, "unread_image": unread}.items():
        for name in iter_py(paths, places):
            problems.add(key, name)
        found.at[places] = FAILED


def _add_sidecars(
    found: CaptionedFiles,
    listing: pa.Table,
    *,
    root: Path,
    rules: CaptionRules,
    problems: Problems,
    index: ScanIndex | None,
) -> None:
    """Give images without a row the captions of their sidecar files."""
    is_text = has_extension(combined(listing["path"]), TEXT_EXTENSIONS)
    if not is_text.any():
        return
    captions, at = read_sidecars(
        root,
        found.paths,
        is_wanted=found.at == NONE,
        files=listing.filter(pa.array(is_text)).combine_chunks(),
        caption_column=rules.caption_column,
        lines=rules.sidecar_lines,
        problems=problems,
        index=index,
    )
    start = found.pool.extend(captions)
    found.at = np.where(at == NONE, found.at, np.where(at == FAILED, FAILED, start + at))


def _add_folder_names(found: CaptionedFiles, tables: CaptionTables, *, rules: CaptionRules) -> None:
    """Give images that no table covers their folder's name in the template."""
    if not rules.caption_template:
        return
    wanting = np.flatnonzero(found.at == NONE)
    folders = [parent(name) for name in iter_py(found.paths, wanting)]
    uncovered = [not tables.covers(folder) for folder in folders]
    _name_by_folder(found, wanting[np.array(uncovered, bool)], rules.caption_template, rules=rules)


def _name_by_folder(
    found: CaptionedFiles, places: np.ndarray, template: str, *, rules: CaptionRules
) -> None:
    """Give the images at `places` their folder's name in a template, where it may be a label."""
    captions: dict[str, int] = {}
    for i, name in zip(places, iter_py(found.paths, places), strict=True):
        label = label_of(parent(name), rules)
        if label is not None:
            if label not in captions:
                caption = label_caption(template, label)
                captions[label] = found.pool.extend(pa.array([[caption]], CAPTIONS))
            found.at[i] = captions[label]


def label_of(folder: str, rules: CaptionRules) -> str | None:
    """Return what a folder's name says of its images; None for a name that is no label.

    With repeat_folders, that is the class of a folder such as 10_dog, in or above it.
    """
    if rules.repeat_folders and (found := repeat_folder(folder)):
        return found[1]
    return name_of(folder) if is_label(folder) else None


def is_label(folder: str) -> bool:
    """Return whether a folder's name may be a label: not the root, a split or a shard."""
    return bool(folder) and folder.lower() not in FOLDER_NAMES and not folder.endswith(".tar")


def _report_uncaptioned(
    found: CaptionedFiles,
    paths: pa.Array,
    *,
    tables: CaptionTables,
    rules: CaptionRules,
    problems: Problems,
) -> None:
    """Report images without a caption, or give them the one that missing_caption names."""
    wanting = np.flatnonzero(found.at == NONE)
    if not len(wanting):
        return
    if rules.missing_caption == "file_name":
        captions = [[file_name_caption(name)] for name in iter_py(found.paths, wanting)]
        start = found.pool.extend(pa.array(captions, CAPTIONS))
        found.at[wanting] = np.arange(start, start + len(wanting))
        return
    if rules.missing_caption == "folder_name":
        _name_by_folder(found, wanting, "{label}", rules=rules)
        wanting = np.flatnonzero(found.at == NONE)
    if rules.missing_caption == "empty":
        found.at[wanting] = found.pool.extend(pa.array([[""]], CAPTIONS))
        for name in iter_py(found.paths, wanting):
            problems.add("empty_caption", name)
        return
    misnamed = paths.filter(pc.match_substring_regex(paths, r"(^|/)metadata\.json$")).to_pylist()
    misnamed = [name for name in misnamed if not tables.covers(parent(name))]
    for name in misnamed:
        problems.add("metadata_json", name)
    if not (found.at != NONE).any() and not problems.count("error"):
        problems.add("no_captions", f"{len(wanting):,} images", _near_misses(paths))
        return
    failed = CaptionTables(failed=tables.failed + [parent(name) for name in misnamed])

    @cache
    def reason(folder: str) -> str | None:
        if failed.failed_above(folder):
            return None  # that table's own problem is enough
        return "unlisted" if tables.covers(folder) else "no_caption"

    for name in iter_py(found.paths, wanting):
        if key := reason(parent(name)):
            problems.add(key, name)


def _near_misses(paths: pa.Array) -> str:
    """Name files that a person may have meant as captions."""
    tables = [path for path in iter_py(paths) if TABLE_LIKE.search(path)][:3]
    if tables:
        expected = ", ".join(METADATA_NAMES)
        return f"{', '.join(tables)}: not read, a caption table must be named one of {expected}"
    texts = list(iter_py(paths, np.flatnonzero(has_extension(paths, TEXT_EXTENSIONS))[:3]))
    if texts:
        return f"{', '.join(texts)}: not read, a caption file must be named as its image is"
    return f"there is no {', '.join(METADATA_NAMES)}, and no {', '.join(TEXT_EXTENSIONS)} file"
