"""Mask files among a folder's files: separated from the images, and matched with them.

NAME.mask.png belongs to the image NAME.jpg, whatever that one's extension is.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import (
    combined,
    find_strings,
    has_extension,
    iter_py,
    stems,
    take_rows,
)
from latentdiff.data.arrow.listing import LISTING
from latentdiff.data.folder.files import IMAGE_EXTENSIONS
from latentdiff.data.folder.problems import Problems

MASK_EXTENSION = ".mask.png"
MASK_FILES = pa.schema(
    [("mask", pa.large_string()), ("mask_size", pa.int64()), ("mask_offset", pa.int64())]
)


def separate_masks(
    listing: pa.Table, *, are_used: bool, problems: Problems
) -> tuple[pa.Table, pa.Table]:
    """Separate a listing into other files and masks. Both have the columns of LISTING.

    Where masks are not used, a mask next to an image is skipped with a note, and a file that is
    only named like a mask stays an image.
    """
    paths = combined(listing["path"])
    is_mask = has_extension(paths, [MASK_EXTENSION])
    if not is_mask.any():
        return listing, LISTING.empty_table()
    if not are_used:
        is_image = has_extension(paths, IMAGE_EXTENSIONS) & ~is_mask
        places = np.flatnonzero(is_mask)
        images = stems(paths.filter(pa.array(is_image)))
        is_mask[places] = find_strings(_names(paths.take(pa.array(places))), images) >= 0
        for name in iter_py(paths, np.flatnonzero(is_mask)):
            problems.add("unused_mask", name)
    parts = (listing.filter(pa.array(chosen)).combine_chunks() for chosen in (~is_mask, is_mask))
    others, masks = parts
    return others, masks


def match_masks(
    headers: pa.Table, masks: pa.Table, *, kept: np.ndarray, problems: Problems
) -> tuple[np.ndarray, pa.Table]:
    """Find the mask of each image that is kept; images without a good one are skipped.

    headers, masks: of all images and of all mask files; kept: rows of `headers`. Returns the rows
    that stay, and the row of MASK_FILES for each.
    """
    paths, mask_paths = combined(headers["path"]), combined(masks["path"])
    at = find_strings(stems(paths), _names(mask_paths))
    for name in iter_py(mask_paths, np.setdiff1d(np.arange(len(masks)), at)):
        problems.add("stray_mask", name)
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


def _names(paths: pa.Array) -> pa.Array:
    """Cut off the masks' extension."""
    return pc.utf8_slice_codeunits(paths, 0, -len(MASK_EXTENSION))


def _sizes(headers: pa.Table) -> np.ndarray:
    """(N, 2) width and height."""
    return np.stack([headers["width"].to_numpy(), headers["height"].to_numpy()], axis=1)
