"""Files that belong to an image: its loss mask, its conditions and its inpainting masks.

NAME.mask.png, or NAME-masklabel.png as OneTrainer names it, belongs to the image NAME.jpg, whatever
that one's extension is; so do NAME.condition.png (NAME-condlabel.png) and NAME.inpaint_mask.png.
Conditions and inpainting masks may be named in a column of the caption table instead, one or a list
of several for an image.
"""

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import (
    StringIndex,
    combined,
    find_names,
    has_extension,
    in_chunks,
    iter_py,
    stems,
    take_rows,
)
from latentdiff.data.folder.caption_tables import find_tables
from latentdiff.data.folder.metadata import path_below, read_column, to_texts
from latentdiff.data.folder.problems import Problems
from latentdiff.image_io import IMAGE_EXTENSIONS

Fit = Literal["size", "aspect"]
EXTENSIONS = {  # the first one found is used
    "mask": (".mask.png", "-masklabel.png"),
    "condition": (
        *(".condition.png", ".condition.jpg", ".condition.jpeg", ".condition.webp"),
        "-condlabel.png",
    ),
    "inpaint_mask": (".inpaint_mask.png",),
}
ALL_EXTENSIONS = tuple(name for names in EXTENSIONS.values() for name in names)


@dataclass(frozen=True)
class CompanionRule:
    """One kind of companion that every image is to have.

    name: of EXTENSIONS; column: of a caption table, "" for none; fit: the size of its image, or
    of the same shape at any size.
    """

    name: str
    column: str = ""
    fit: Fit = "size"


@dataclass(frozen=True)
class Companions:
    """The companions of one kind among a folder's files.

    files: columns of LISTING; owners: (P,) paths of images that tables name, and of_owner: (P,)
    the row in `files` of what they name.
    """

    rule: CompanionRule
    files: pa.Table
    owners: pa.Array
    of_owner: np.ndarray


def companion_fields(name: str) -> list[pa.Field]:
    """List the columns of a kind that an image may have several of: path, size, offset."""
    numbers = pa.large_list(pa.int64())
    kinds = {"": pa.large_list(pa.large_string()), "_size": numbers, "_offset": numbers}
    return [pa.field(f"{name}{end}", kind) for end, kind in kinds.items()]


def no_companions(num: int, name: str) -> pa.Table:
    """Give `num` rows of `companion_fields` without any."""
    fields = companion_fields(name)
    return pa.table([pa.nulls(num, field.type) for field in fields], schema=pa.schema(fields))


def find_companions(
    root: Path, listing: pa.Table, rule: CompanionRule, *, file_column: str, problems: Problems
) -> Companions:
    """Find the files of one kind in a listing, by their names and in the caption tables' column."""
    paths = combined(listing["path"])
    owners, named = [pa.array([], pa.large_string())], [np.zeros(0, np.int64)]
    if rule.column:
        listed, rows = StringIndex(paths), _named_files(root, paths, rule, file_column, problems)
        for chunk in in_chunks(rows):
            where, images, files = (list(column) for column in zip(*chunk, strict=True))
            found = listed.find(pa.array(files, pa.large_string()))
            for i in np.flatnonzero(found < 0):
                key = "windows_path" if "\\" in files[i] else "missing_file"
                problems.add(key, where[i], files[i])
            there = np.flatnonzero(found >= 0)
            owners.append(pa.array([images[i] for i in there], pa.large_string()))
            named.append(found[there].astype(np.int64))
    places = np.concatenate(named)
    by_name = np.flatnonzero(has_extension(paths, EXTENSIONS[rule.name]))
    rows_of_files = np.union1d(by_name, places)
    return Companions(
        rule,
        take_rows(listing, rows_of_files),
        pa.concat_arrays(owners),
        np.searchsorted(rows_of_files, places),
    )


def without_companions(listing: pa.Table, companions: Companions) -> pa.Table:
    """Return a listing without the files that are named as companions of the kind are."""
    is_one = has_extension(combined(listing["path"]), EXTENSIONS[companions.rule.name])
    return listing.filter(pa.array(~is_one)).combine_chunks() if is_one.any() else listing


def kind_of_name(path: str) -> str:
    """Return which kind of companion a path is named as; "" for none."""
    lower = path.lower()
    return next((kind for kind, names in EXTENSIONS.items() if lower.endswith(names)), "")


def is_companion_name(paths: pa.Array) -> np.ndarray:
    """Test which paths are named as companions are: (N,) bool."""
    return has_extension(paths, ALL_EXTENSIONS)


def belongs_to_image(companions: pa.Array, paths: pa.Array) -> np.ndarray:
    """Test which companions, by name, have their image among `paths`: (N,) bool."""
    is_image = has_extension(paths, IMAGE_EXTENSIONS) & ~is_companion_name(paths)
    images = stems(paths.filter(pa.array(is_image)))
    found: np.ndarray = find_names(_names(companions, ALL_EXTENSIONS), images) >= 0
    return found


def match_companions(
    headers: pa.Table,
    companions: Companions,
    files: pa.Table,
    *,
    kept: np.ndarray,
    problems: Problems,
) -> tuple[np.ndarray, pa.Table]:
    """Find the companions of each image that is kept; an image without good ones is skipped.

    headers, files: headers of all images, and of the companions' files; kept: rows of `headers`.
    Returns the rows that stay, and the row of `companion_fields` for each.
    """
    rule, paths = companions.rule, combined(headers["path"])
    image, file = _pairs(companions, files, paths, problems)
    is_kept = np.zeros(len(paths), bool)
    is_kept[kept] = True
    image, file = image[is_kept[image]], file[is_kept[image]]
    is_bad = _report_bad(rule, headers, files, image=image, file=file, problems=problems)
    is_good = np.zeros(len(paths), bool)
    is_good[image] = True
    for name in iter_py(paths, kept[~is_good[kept]]):
        problems.add(f"no_{rule.name}", name)
    is_good[image[is_bad]] = False
    kept = kept[is_good[kept]]
    file = file[is_good[image]]
    counts = np.bincount(image[is_good[image]], minlength=len(paths))[kept]
    starts = pa.array(np.concatenate([[0], np.cumsum(counts)]))
    fields = companion_fields(rule.name)
    flat = take_rows(files.select(["path", "size", "offset"]), file).columns
    lists = [pa.LargeListArray.from_arrays(starts, combined(column)) for column in flat]
    return kept, pa.table(lists, schema=pa.schema(fields))


def _named_files(
    root: Path, paths: pa.Array, rule: CompanionRule, file_column: str, problems: Problems
) -> Iterator[tuple[str, str, str]]:
    """Yield (table:row, image, companion) of each companion that a caption table names."""
    for table in find_tables(paths, Problems()).names:
        folder = posixpath.dirname(table)
        rows = read_column(root, table, column=rule.column, file_column=file_column)
        for number, image, value in rows:
            where = f"{table}:{number}"
            if not value:
                continue
            if (names := to_texts(value)) is None:
                problems.add("file_name_type", where, f'"{rule.column}" is {ascii(value)[:80]}')
                continue
            for name in names:
                if (path := path_below(name, folder, where=where, problems=problems)) is not None:
                    yield where, image, path


def _pairs(
    companions: Companions, files: pa.Table, paths: pa.Array, problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """Return images and their files, two (P,) arrays of rows, by image, in the tables' order."""
    file_paths = combined(files["path"])
    owner = find_names(companions.owners, paths)
    image, file = owner[owner >= 0], companions.of_owner[owner >= 0]
    by_name = _by_name(paths, file_paths, EXTENSIONS[companions.rule.name])
    own = np.flatnonzero(by_name >= 0)
    own = own[~np.isin(own, image)]  # a table comes first
    image, file = np.concatenate([image, own]), np.concatenate([file, by_name[own]])
    name = companions.rule.name
    unused = np.setdiff1d(np.arange(len(files)), np.concatenate([file, companions.of_owner]))
    is_second = belongs_to_image(file_paths.take(pa.array(unused)), paths)
    for path, second in zip(iter_py(file_paths, unused), is_second, strict=True):
        problems.add(f"second_{name}" if second else f"stray_{name}", path)
    order = np.argsort(image, kind="stable")
    return image[order], file[order]


def _report_bad(
    rule: CompanionRule,
    headers: pa.Table,
    files: pa.Table,
    *,
    image: np.ndarray,
    file: np.ndarray,
    problems: Problems,
) -> np.ndarray:
    """Name the companions that cannot be read, or do not fit their image: (P,) bool."""
    is_broken = files["problem"].is_valid().to_numpy()[file]
    sizes, wanted = _sizes(files)[file], _sizes(headers)[image]
    fits = (sizes == wanted).all(axis=1) if rule.fit == "size" else _same_aspect(sizes, wanted)
    for i in np.flatnonzero(is_broken | ~fits):
        row = int(file[i])
        name = files["path"][row].as_py()
        if is_broken[i]:
            detail = f"{files['problem'][row]}, {files['detail'][row]}"
            problems.add(f"broken_{rule.name}", name, detail)
        else:
            detail = "{} x {}, its image {} x {}".format(*sizes[i], *wanted[i])
            problems.add(f"{rule.name}_{rule.fit}", name, detail)
    bad: np.ndarray = is_broken | ~fits
    return bad


def _same_aspect(sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Test which sizes (N, 2) are others scaled, but for the rounding to whole pixels: (N,)."""
    scale = sizes / np.maximum(wanted, 1)
    width, height = scale.T
    off = np.abs(sizes - wanted * np.stack([height, width], axis=1))  # by the other side's scale
    same: np.ndarray = (off < 1).any(axis=1)
    return same


def _by_name(images: pa.Array, files: pa.Array, extensions: tuple[str, ...]) -> np.ndarray:
    """Find each image's file by its name, (N,) places in `files`, or -1."""
    at, names = np.full(len(images), -1, np.int64), stems(images)
    for extension in extensions:
        places = np.flatnonzero(has_extension(files, [extension]))
        found = find_names(names, _names(files.take(pa.array(places)), extensions))
        at = np.where((at < 0) & (found >= 0), places[found] if len(places) else at, at)
    return at


def _names(paths: pa.Array, extensions: tuple[str, ...]) -> pa.Array:
    """Cut off the companions' extension."""
    pattern = "|".join(map(re.escape, extensions))
    return pc.replace_substring_regex(paths, rf"(?i)({pattern})$", "")


def _sizes(headers: pa.Table) -> np.ndarray:
    """(N, 2) width and height."""
    return np.stack([headers["width"].to_numpy(), headers["height"].to_numpy()], axis=1)
