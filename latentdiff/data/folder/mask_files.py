"""Mask files among a folder's files: separated from the images, and matched with them.

NAME.mask.png, or NAME-masklabel.png as OneTrainer names it, belongs to the image NAME.jpg, whatever
that one's extension is.
"""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import (
    combined,
    find_names,
    has_extension,
    iter_py,
    stems,
    take_rows,
)
from latentdiff.data.arrow.listing import LISTING
from latentdiff.data.folder.problems import Problems
from latentdiff.image_io import IMAGE_EXTENSIONS

MASK_EXTENSIONS = (".mask.png", "-masklabel.png")  # the first one found is used
MASK_FILES = pa.schema(
    [("mask", pa.large_string()), ("mask_size", pa.int64()), ("mask_offset", pa.int64())]
)


def separate_masks(listing: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Separate a listing into other files and masks. Both have the columns of LISTING."""
    is_mask = is_mask_name(combined(listing["path"]))
    if not is_mask.any():
        return listing, LISTING.empty_table()
    others, masks = (listing.filter(pa.array(chosen)) for chosen in (~is_mask, is_mask))
    return others.combine_chunks(), masks.combine_chunks()


def is_mask_name(paths: pa.Array) -> np.ndarray:
    """Test which paths are named as masks are: (N,) bool."""
    return has_extension(paths, MASK_EXTENSIONS)


def belongs_to_image(masks: pa.Array, paths: pa.Array) -> np.ndarray:
    """Test which masks have their image among `paths`: (N,) bool."""
    is_image = has_extension(paths, IMAGE_EXTENSIONS) & ~is_mask_name(paths)
    found: np.ndarray = find_names(_names(masks), stems(paths.filter(pa.array(is_image)))) >= 0
    return found


def match_masks(
    headers: pa.Table, masks: pa.Table, *, kept: np.ndarray, problems: Problems
) -> tuple[np.ndarray, pa.Table]:
    """Find the mask of each image that is kept; images without a good one are skipped.

    headers, masks: of all images and of all mask files; kept: rows of `headers`. Returns the rows
    that stay, and the row of MASK_FILES for each.
    """
    paths, mask_paths = combined(headers["path"]), combined(masks["path"])
    at = _masks_of(paths, mask_paths)
    unused = np.setdiff1d(np.arange(len(masks)), at)
    is_second = belongs_to_image(mask_paths.take(pa.array(unused)), paths)
    for name, second in zip(iter_py(mask_paths, unused), is_second, strict=True):
        problems.add("second_mask" if second else "stray_mask", name)
    at = at[kept]
    if not len(masks):
        for name in iter_py(paths, kept):
            problems.add("no_mask", name)
        return kept[:0], MASK_FILES.empty_table()
    is_broken = masks["problem"].is_valid().to_numpy()[at]
    sizes, wanted = _sizes(masks)[at], _sizes(headers)[kept]
    is_good = (at >= 0) & ~is_broken & (sizes == wanted).all(axis=1)
    for i in np.flatnonzero(~is_good):
        row = int(at[i])
        if row < 0:
            problems.add("no_mask", paths[int(kept[i])].as_py())
        elif is_broken[i]:
            detail = f"{masks['problem'][row]}, {masks['detail'][row]}"
            problems.add("broken_mask", mask_paths[row].as_py(), detail)
        else:
            detail = "{} x {}, its image {} x {}".format(*sizes[i], *wanted[i])
            problems.add("mask_size", mask_paths[row].as_py(), detail)
    found = take_rows(masks.select(["path", "size", "offset"]), at[is_good])
    return kept[is_good], found.rename_columns(MASK_FILES.names)


def no_masks(num: int) -> pa.Table:
    """Give `num` empty rows of MASK_FILES."""
    return pa.table([pa.nulls(num, field.type) for field in MASK_FILES], schema=MASK_FILES)


def _masks_of(images: pa.Array, masks: pa.Array) -> np.ndarray:
    """Find each image's mask, (N,) places in `masks`, or -1."""
    at, names = np.full(len(images), -1, np.int64), stems(images)
    for extension in MASK_EXTENSIONS:
        places = np.flatnonzero(has_extension(masks, [extension]))
        found = find_names(names, _names(masks.take(pa.array(places))))
        at = np.where((at < 0) & (found >= 0), places[found] if len(places) else at, at)
    return at


def _names(paths: pa.Array) -> pa.Array:
    """Cut off the masks' extension."""
    pattern = "|".join(map(re.escape, MASK_EXTENSIONS))
    return pc.replace_substring_regex(paths, rf"(?i)({pattern})$", "")


def _sizes(headers: pa.Table) -> np.ndarray:
    """(N, 2) width and height."""
    return np.stack([headers["width"].to_numpy(), headers["height"].to_numpy()], axis=1)
