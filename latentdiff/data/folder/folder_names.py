"""What the names of folders say of the images in them: their split, and how often each comes.

A split is that of the folder, as test/, or else of a stable hash. A folder named REPEATS_CLASS, as
kohya's 10_dog, says that each image in it comes REPEATS times in an epoch, and names the class that
it shows. Does not answer for: the weights of several sources (epoch_draws.py).
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pyarrow as pa

from latentdiff.data.arrow.columns import folders_of, iter_py
from latentdiff.data.arrow.listing import TABLES, is_table_row

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FOLDER_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
REPEAT_FOLDER = re.compile(r"(\d{1,4})_(.+)")


def assign_splits(ids: Iterable[str], fraction: float, *, num: int) -> np.ndarray:
    """Give each of `num` record ids a place in SPLITS, (N,) int8.

    Where any top folder is named for a held-out split, folders decide. Elsewhere the share
    `fraction` in [0, 1) of the records, chosen by hash, becomes the validation split: a record
    stays where it is whatever else is added to the folder, and in a copy whose names a Mac wrote
    in another form of Unicode.
    """
    by_folder, by_hash = np.zeros(num, np.int8), np.zeros(num, np.int8)
    for i, record_id in enumerate(ids):
        by_folder[i] = SPLITS.index(split_of_folder(record_id))
        by_hash[i] = (
            SPLITS.index("validation")
            if unit_hash(unicodedata.normalize("NFC", record_id)) < fraction
            else 0
        )
    return by_folder if by_folder.any() else by_hash


def split_of_folder(record_id: str) -> Split:
    """Read a record's split from its top folder's name; "train" for any other name.

    A shard in the top folder counts as one by the start of its name, as in val-0001.tar; a table
    by a word of its name or by any folder, as in data/test-00000-of-00001.parquet.
    """
    if is_table_row(record_id):
        *folders, file, _ = record_id.lower().split("/")
        words = (*re.split(r"[-_.\d]", file), *folders)
        return next((FOLDER_NAMES[word] for word in words if word in FOLDER_NAMES), "train")
    top, slash, _ = record_id.partition("/")
    if top.endswith(".tar"):
        top = re.split(r"[-_.\d]", top, maxsplit=1)[0]
    return FOLDER_NAMES.get(top.lower(), "train") if slash else "train"


def like_heldout(folder: str) -> bool:
    """Whether a top folder begins as a held-out split but is none, as test_easy or val2017."""
    first = re.split(r"[-_. \d]", folder.lower(), maxsplit=1)[0]
    return folder.lower() not in FOLDER_NAMES and FOLDER_NAMES.get(first, "train") != "train"


def unit_hash(text: str) -> float:
    """Map a text to [0, 1), evenly and the same everywhere: the first 53 bits of its SHA-256."""
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


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
