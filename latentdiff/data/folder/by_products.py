"""Images that programs leave next to photographs: thumbnails, samples of runs, masks.

They count only where somebody gave them a caption of their own; else each is named and not used.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import combined, find_names, has_extension, iter_py, stems
from latentdiff.data.folder.problems import Problems
from latentdiff.image_io import IMAGE_EXTENSIONS

# Folders of NAS systems, archives, file managers and trainers' previews; Synology's thumbnails.
BY_PRODUCT = (
    r"(?i)(^|/)(@eadir|#recycle|@recycle|\$recycle\.bin|__macosx|lost\+found|thumbs?|thumbnails?"
    r"|samples?)/|(^|/)synophoto_thumb[^/]*$"
)
# What is cut out of a path gives the path of the image that the file belongs to.
COMPANION = r"(?i)([-_]mask|-condlabel)$|\bmasks?/"
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
