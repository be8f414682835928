"""Conditions next to their images: how many there are, and which are black or equal their image.

Missing ones, and those that do not fit, are problems of the folder already (folder/).
"""

import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np

from latentdiff.data.arrow.stat_cache import IMAGE_THREADS
from latentdiff.data.folder.folder import Companion, Folder
from latentdiff.data.folder.problems import Problems
from latentdiff.image_io import ImageError, load_thumbnail

MAX_CHECKED = 2000  # images whose conditions are decoded, evenly over the folder
SIDE = 64  # of the thumbnails that are compared
MAX_BLACK, MAX_DIFFERENCE = 4.0, 1.0  # of 255: the brightest value, and the mean difference


@dataclass(frozen=True)
class PairStats:
    """Conditions, or inpainting masks, of a folder's images; num_checked: of those decoded."""

    name: str
    num: int
    max_per_image: int
    num_checked: int


def companion_kinds(folder: Folder) -> list[Companion]:
    """List which kinds of files the images of a folder have next to them."""
    return [name for name in get_args(Companion) if len(folder[:1].companions(name)[0])]


def check_pairs(folder: Folder, *, may_equal: bool) -> tuple[list[PairStats], Problems]:
    """Decode conditions, of a subsample of a large folder, and name those that teach nothing.

    may_equal: conditions may be their images, as for super-resolution.
    """
    chosen = np.unique(np.linspace(0, len(folder) - 1, min(len(folder), MAX_CHECKED)).astype(int))
    stats, problems = [], Problems()
    for name in companion_kinds(folder):
        files, starts = folder.companions(name)
        counts = np.diff(starts)
        stats.append(PairStats(name, len(files), int(counts.max()), int(counts[chosen].sum())))
        for key, where in _all_faults(folder.select(chosen), name):
            if key == "black" or (name == "condition" and not may_equal):
                problems.add(f"{key}_{name}", where)
    return stats, problems


def _all_faults(folder: Folder, name: Companion) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the conditions of all images, in their order."""
    files, starts = folder.companions(name)
    find = partial(_faults, folder, files, starts)
    with ThreadPoolExecutor(IMAGE_THREADS) as threads:
        for faults in threads.map(find, range(len(folder))):
            yield from faults


def _faults(folder: Folder, files: Folder, starts: np.ndarray, index: int) -> list[tuple[str, str]]:
    """List what is wrong with one image's conditions: ("black" or "equal", the file)."""
    found = []
    try:
        image = _thumbnail(folder, index)
        for place in range(*starts[index : index + 2].tolist()):
            condition = _thumbnail(files, place)
            if condition.max() <= MAX_BLACK:
                found.append(("black", files[place].id))
            elif condition.shape == image.shape and (
                np.abs(condition - image).mean() < MAX_DIFFERENCE
            ):
                found.append(("equal", files[place].id))
    except (ImageError, OSError):
        return found  # a damaged file is a problem of its own
    return found


def _thumbnail(folder: Folder, index: int) -> np.ndarray:
    file = io.BytesIO(folder.read_bytes(index))
    return np.asarray(load_thumbnail(file, side=SIDE, background=(0, 0, 0)), np.float32)


def pair_line(stats: PairStats) -> str:
    """Write the counts of a kind in a line."""
    names: Mapping[str, str] = {"condition": "conditions", "inpaint_mask": "inpainting masks"}
    several = f", up to {stats.max_per_image:,} an image" if stats.max_per_image > 1 else ""
    checked = "" if stats.num_checked == stats.num else f"; {stats.num_checked:,} were looked at"
    return f"{stats.num:,} {names[stats.name]}{several}{checked}"
