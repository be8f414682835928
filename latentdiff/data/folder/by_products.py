"""Files next to the photographs that are not trained on: thumbnails, samples of runs, masks, kinds
that cannot be read.

Images among them count only where somebody gave them a caption of their own; else each is named and
not used. Other files are counted by kind.
"""

import posixpath
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import combined, find_names, has_extension, iter_py, stems
from latentdiff.data.folder.problems import Problems
from latentdiff.image_io import (
    BY_CONTENT_EXTENSIONS,
    IMAGE_EXTENSIONS,
    READABLE_EXTENSIONS,
    UNREADABLE_EXTENSIONS,
)

# Folders of NAS systems, archives, file managers and trainers' previews; Synology's thumbnails.
BY_PRODUCT = (
    r"(?i)(^|/)(@eadir|#recycle|@recycle|\$recycle\.bin|__macosx|lost\+found|thumbs?|thumbnails?"
    r"|samples?)/|(^|/)synophoto_thumb[^/]*$"
)
# What is cut out of a path gives the path of the image that the file belongs to.
COMPANION = r"(?i)([-_]mask|-condlabel)$|\bmasks?/"
# Text, tables and what programs keep next to images: nobody means these as images.
SIDE_FILES = (
    r"(?i)(\.(txt|caption|jsonl?|jsonlines|csv|tsv|parquet|arrow|tar|gz|tgz|bz2|xz|zst|zip|7z|rar"
    r"|npy|npz|pt|pth|safetensors|ckpt|bin|pkl|h5|md|rst|html?|xml|ya?ml|toml|ini|cfg|conf|py|ipynb"
    r"|sh|log|xmp|aae|thm|pp3|dop|url|lnk|lock|sha256|md5|db|tmp|bak)"
    r"|(^|/)(readme|licen[cs]e|copying|notice|authors|citation|makefile|dockerfile|checksums?"
    r"|(sha256|md5)sums?|desktop\.ini|icon\r?))$"
)
RUN_FILES = ("config.yaml", "metrics.jsonl")  # in a folder: a training run's output


def without_runs(listing: pa.Table, problems: Problems) -> pa.Table:
    """Take the output of training runs below the root, class images too, out of a listing."""
    paths = combined(listing["path"])
    metrics = paths.filter(pc.ends_with(paths, "/" + RUN_FILES[1])).to_pylist()
    runs = [path.removesuffix(RUN_FILES[1]) for path in metrics]
    is_run_file = np.zeros(len(paths), bool)
    for run in runs:
        if pc.is_in(pa.array([run + RUN_FILES[0]], paths.type), paths)[0].as_py():
            is_run_file |= pc.starts_with(paths, run).to_numpy(zero_copy_only=False)
    if not is_run_file.any():
        return listing
    for name in iter_py(
        paths, np.flatnonzero(is_run_file & has_extension(paths, IMAGE_EXTENSIONS))
    ):
        problems.add("by_product", name)
    return listing.filter(pa.array(~is_run_file)).combine_chunks()


def find_by_products(images: pa.Array, *, among: np.ndarray) -> np.ndarray:
    """Find the by-products among the images at the places `among`; return their places.

    A file named like a mask counts only next to its image: NAME_mask.png, masks/NAME.png.
    """
    chosen = images.take(pa.array(among))
    is_one = pc.match_substring_regex(chosen, BY_PRODUCT).to_numpy(zero_copy_only=False)
    names = stems(chosen)
    owners = pc.replace_substring_regex(names, COMPANION, "")
    places = np.flatnonzero(pc.not_equal(owners, names).to_numpy(zero_copy_only=False))
    if len(places):
        is_one[places] |= find_names(owners.take(pa.array(places)), stems(images)) >= 0
    return among[is_one]


def find_unread(images: pa.Array, *, among: np.ndarray, next_to_copy: bool = False) -> np.ndarray:
    """Find the images of kinds that are not read among those at the places `among`.

    next_to_copy: only those next to a readable image of their name, as RAW next to JPEG.
    """
    unread = among[has_extension(images.take(pa.array(among)), UNREADABLE_EXTENSIONS)]
    if not next_to_copy or not len(unread):
        return unread
    readable = READABLE_EXTENSIONS + BY_CONTENT_EXTENSIONS
    copies = images.filter(pa.array(has_extension(images, readable)))
    return unread[find_names(stems(images.take(pa.array(unread))), stems(copies)) >= 0]


def report_other_files(paths: pa.Array, problems: Problems) -> None:
    """Note how many files there are of each kind that is neither image, caption nor side file."""
    is_known = pc.match_substring_regex(paths, SIDE_FILES)
    is_known = pc.or_(is_known, pc.match_substring_regex(paths, BY_PRODUCT))
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for path in iter_py(paths.filter(pc.invert(is_known))):
        kinds[posixpath.splitext(path)[1].lower() or "no extension"].append(path)
    for kind, names in sorted(kinds.items()):
        some = "file" if len(names) == 1 else "files, such as"
        problems.add("other_files", kind, f"{len(names):,} {some} {names[0]}")
