"""Mask files among a folder's files: told from the images, and matched with them.

NAME.mask.png belongs to the image NAME.jpg, whatever that one's extension is.
"""

from pathlib import Path

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
from latentdiff.data.arrow.listing import LISTING, Progress
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.folder.files import IMAGE_EXTENSIONS
from latentdiff.data.folder.image_headers import read_image_headers
from latentdiff.data.folder.problems import Problems

MASK_EXTENSION = ".mask.png"
FOUND = pa.schema(
    [("mask", pa.large_string()), ("mask_size", pa.int64()), ("mask_offset", pa.int64())]
)


def part_masks(
    listing: pa.Table, *, are_used: bool, problems: Problems
) -> tuple[pa.Table, pa.Table]:
    """Part a listing into what is no mask, and masks. Both have the columns of LISTING.

    Where masks are not used, one that stands beside an image is left out with a note, and a file
    that is only called like a mask stays an image.
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
    root: Path,
    masks: pa.Table,
    facts: pa.Table,
    kept: np.ndarray,
    *,
    problems: Problems,
    index: ScanIndex | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> tuple[np.ndarray, pa.Table]:
    """Find the mask of each image that is kept; those without a good one are left out.

    facts: of all images, kept: rows of it. Returns the rows that stay, and a row of FOUND each.
    """
    known = read_image_headers(root, masks, name="masks", index=index, full=full, progress=progress)
    at = find_strings(stems(combined(facts["path"])), _names(combined(known["path"])))
    for name in iter_py(combined(known["path"]), np.setdiff1d(np.arange(len(known)), at)):
        problems.add("stray_mask", name)
    at = at[kept]
    if not len(known):
        for name in iter_py(combined(facts["path"]), kept):
            problems.add("no_mask", name)
        return kept[:0], FOUND.empty_table()
    is_broken = known["problem"].is_valid().to_numpy()[at]
    sizes, wanted = _sizes(known)[at], _sizes(facts)[kept]
    is_good = (at >= 0) & ~is_broken & (sizes == wanted).all(axis=1)
    for i in np.flatnonzero(~is_good):
        name = facts["path"][int(kept[i])].as_py()
        if at[i] < 0:
            problems.add("no_mask", name)
        elif is_broken[i]:
            told = f"{known['problem'][int(at[i])]}, {known['detail'][int(at[i])]}"
            problems.add("broken_mask", known["path"][int(at[i])].as_py(), told)
        else:
            told = "{} x {}, its image {} x {}".format(*sizes[i], *wanted[i])
            problems.add("mask_size", known["path"][int(at[i])].as_py(), told)
    found = take_rows(known.select(["path", "size", "offset"]), at[is_good])
    return kept[is_good], found.rename_columns(FOUND.names)


def no_masks(num: int) -> pa.Table:
    """Give `num` empty rows of FOUND."""
    return pa.table([pa.nulls(num, field.type) for field in FOUND], schema=FOUND)


def _names(paths: pa.Array) -> pa.Array:
    """Cut the masks' extension off."""
    return pc.utf8_slice_codeunits(paths, 0, -len(MASK_EXTENSION))


def _sizes(facts: pa.Table) -> np.ndarray:
    """(N, 2) width and height."""
    return np.stack([facts["width"].to_numpy(), facts["height"].to_numpy()], axis=1)
