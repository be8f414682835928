"""How often an epoch shows each image of kohya's repeat folders, such as 10_dog.

A folder named REPEATS_CLASS says that each image in it comes REPEATS times in an epoch, and names
the class that it shows. Does not answer for: the weights of several sources (epoch_draws.py).
"""

import re

import numpy as np
import pyarrow as pa

from latentdiff.data.arrow.columns import folders_of, iter_py
from latentdiff.data.arrow.listing import TABLES

REPEAT_FOLDER = re.compile(r"(\d{1,4})_(.+)")


def repeat_folder(folder: str) -> tuple[int, str] | None:
    """Return the repeats and the class of the innermost folder of a path that names both.

    folder: of a record's id, as in "train/10_dog"; shards and tables in it are no folders.
    """
    for name in reversed(folder.split("/")):
        found = REPEAT_FOLDER.fullmatch(name)
        if found and not name.lower().endswith((".tar", *TABLES)):
            return int(found[1]), found[2]
    return None


def count_repeats(paths: pa.Array) -> np.ndarray:
    """Return the repeats that the folders of some paths name, (N,) int32; 1 for other folders."""
    folders = folders_of(paths).dictionary_encode()
    named = map(repeat_folder, iter_py(folders.dictionary))
    counts = np.array([1 if found is None else found[0] for found in named], np.int32)
    return counts[folders.indices.to_numpy()]
