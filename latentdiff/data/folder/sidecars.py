"""Captions in files next to the images: cat.jpg with cat.txt, cat.caption or cat.json."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from latentdiff.data.arrow.columns import (
    CAPTIONS,
    combined,
    find_names,
    has_extension,
    iter_py,
    stems,
)
from latentdiff.data.arrow.listing import LISTING, Entry, read_entry
from latentdiff.data.arrow.scan_index import ScanIndex, settings_hash
from latentdiff.data.arrow.stat_cache import cached_rows
from latentdiff.data.captions import clean_caption
from latentdiff.data.folder.files import TEXT_EXTENSIONS
from latentdiff.data.folder.metadata import (
    decoded_lines,
    no_column,
    parse_json,
    to_texts,
)
from latentdiff.data.folder.problems import Problems

MAX_BYTES = 1_000_000
# captions: at least one; null where the file cannot be used.
SIDECARS = pa.schema(
    [
        *LISTING,
        pa.field("captions", CAPTIONS),
        pa.field("problem", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
NONE, FAILED = -2, -1  # so that the greatest of several places is the best
_Cells = tuple[list[str] | None, str | None, str | None]  # captions, problem, detail


def read_sidecars(
    root: Path,
    images: pa.Array,
    *,
    is_wanted: np.ndarray,
    files: pa.Table,
    caption_column: str,
    lines: Literal["one", "captions"],
    problems: Problems,
    index: ScanIndex | None = None,
) -> tuple[pa.Array, np.ndarray]:
    """Find captions in `files` (columns of LISTING) next to the images that want one.

    A .txt or .caption file comes before a .json file, which holds an object whose `caption_column`
    is a text or a list of texts. lines: a text file is one caption, or has one a line. Files that
    `index` knows are not opened. Returns the captions (M,) and each image's place among them,
    (N,) int64: NONE without a file, FAILED where the file cannot be used.
    """
    sidecars = _find_sidecars(images, files)
    has_text = (sidecars[:, :2] != NONE).any(axis=1)
    sidecars[has_text, 2] = NONE
    for name in iter_py(images, np.flatnonzero(has_text & ~is_wanted)):
        problems.add("two_sources", name)
    _report_strays(files, sidecars, problems)
    sidecars[~is_wanted] = NONE
    used = np.setdiff1d(sidecars, [NONE])
    settings = settings_hash({"column": caption_column, "lines": lines})
    texts = cached_rows(
        files.take(pa.array(used)).combine_chunks(),
        lambda entry: _read(root, entry, caption_column=caption_column, lines=lines),
        name=f"sidecars-{settings[:8]}",
        schema=SIDECARS,
        index=index,
    )
    at = np.full(len(files) + 2, NONE, np.int64)  # at[NONE], from the end, stays NONE
    at[used] = _report(texts, problems)
    places = at[sidecars]  # (N, 3)
    _report_contradictions(images, places, texts, problems=problems)
    return combined(texts["captions"]), places.max(axis=1)


def _find_sidecars(images: pa.Array, files: pa.Table) -> np.ndarray:
    """Find the places of each image's .txt, .caption and .json file, (N, 3), or NONE."""
    paths = combined(files["path"])
    sidecars = np.full((len(images), len(TEXT_EXTENSIONS)), NONE, np.int64)
    wanted = stems(images)
    for column, kind in enumerate(TEXT_EXTENSIONS):
        places = np.flatnonzero(has_extension(paths, [kind]))
        at = find_names(wanted, stems(paths.take(pa.array(places))))
        sidecars[at >= 0, column] = places[at[at >= 0]]
    return sidecars


def _report_strays(files: pa.Table, sidecars: np.ndarray, problems: Problems) -> None:
    """Note the text files that belong to no image, if any text file of their kind does."""
    paths = combined(files["path"])
    for column, kind in enumerate(TEXT_EXTENSIONS[:2]):
        is_stray = has_extension(paths, [kind])
        used = np.setdiff1d(sidecars[:, column], [NONE])
        if len(used):
            is_stray[used] = False
            for name in iter_py(paths, np.flatnonzero(is_stray)):
                problems.add("stray_caption", name)


def _report_contradictions(
    images: pa.Array, places: np.ndarray, texts: pa.Table, *, problems: Problems
) -> None:
    """Add a problem for each image whose .txt and .caption file differ."""
    captions = combined(texts["captions"])
    for i in np.flatnonzero((places[:, :2] >= 0).all(axis=1)):
        first, second = (captions[int(place)] for place in places[i, :2])
        if not first.equals(second):
            problems.add("two_captions", images[int(i)].as_py())


def _report(texts: pa.Table, problems: Problems) -> np.ndarray:
    """Add the files' problems; give each file's place, or FAILED."""
    for i in np.flatnonzero(texts["problem"].is_valid().to_numpy()):
        row = texts.slice(int(i), 1).to_pylist()[0]
        problems.add(row["problem"], row["path"], row["detail"] or "")
    is_good = texts["captions"].is_valid().to_numpy()
    return np.where(is_good, np.arange(len(texts)), FAILED)


class _UnusableError(Exception):
    """Why a file cannot be used: a key of problems.REASONS, and what was found."""

    def __init__(self, key: str, detail: str) -> None:
        super().__init__(detail)
        self.key, self.detail = key, detail


def _read(root: Path, entry: Entry, *, caption_column: str, lines: str) -> _Cells:
    try:
        rows = _read_lines(root, entry)
        if entry.path.lower().endswith(".json"):
            texts = _json_texts("".join(rows), caption_column)
        else:
            texts = rows if lines == "captions" else ["".join(rows)]
    except _UnusableError as error:
        return None, error.key, error.detail
    cleaned = [clean_caption(text) for text in texts]
    controls = "control_characters" if any(had for _, had in cleaned) else None
    captions = [caption for caption, _ in cleaned if caption]
    return captions or [""], controls if captions else "empty_caption", None


def _read_lines(root: Path, entry: Entry) -> list[str]:
    if entry.size > MAX_BYTES:
        raise _UnusableError("caption_type", f"a caption file of more than {MAX_BYTES:,} bytes")
    try:
        return list(decoded_lines(io.BytesIO(read_entry(root, entry))))
    except OSError as error:
        raise _UnusableError("unreadable", error.strerror or str(error)) from error
    except ValueError as error:
        raise _UnusableError("caption_not_utf8", str(error)) from error


def _json_texts(text: str, caption_column: str) -> list[str]:
    try:
        row = parse_json(text, [caption_column])
    except ValueError as error:
        raise _UnusableError("broken_metadata", str(error)) from error
    if not isinstance(row, dict):
        got = type(row).__name__
        raise _UnusableError("broken_metadata", f"expected a JSON object, got {got}")
    if caption_column not in row:
        raise _UnusableError("no_column", no_column(caption_column, list(row)))
    texts = to_texts(row[caption_column])
    if texts is None:
        got = ascii(row[caption_column])[:80]
        raise _UnusableError("caption_type", f'"{caption_column}" is {got}')
    return texts
