"""The size and kind of each image, by its header or by decoding it; problems are named."""

import posixpath
from pathlib import Path

import pyarrow as pa

from latentdiff.data.arrow.listing import LISTING, Entry, Progress, is_table_row, open_entry
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.arrow.stat_cache import IMAGE_THREADS, cached_rows
from latentdiff.image_io import (
    BY_CONTENT_EXTENSIONS,
    EXTENSIONS,
    UNREADABLE_EXTENSIONS,
    ImageError,
    ImageHeader,
    load_image,
    read_header,
)

# problem is a key of problems.REASONS, whose image is skipped; note holds such keys, with commas.
HEADERS = pa.schema(
    [
        *LISTING,
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("problem", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("note", pa.string()),
    ]
)
ImageHeaders = tuple[int, int, str | None, str | None, str | None]


def read_image_headers(
    root: Path,
    files: pa.Table,
    *,
    name: str = "pictures",  # of the table in a scan index of any version
    index: ScanIndex | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> pa.Table:
    """Read the headers of the images in `files` (columns of LISTING), one row of HEADERS each.

    Headers are read, and files whose end looks wrong are decoded; `full` decodes all, also those
    that the index knows. name: of the index's table.
    """
    return cached_rows(
        files,
        lambda entry: read_image_header(root, entry, full=full),
        name=name,
        schema=HEADERS,
        index=index,
        again=full,
        num_threads=IMAGE_THREADS,
        progress=progress,
    )


def read_image_header(root: Path, entry: Entry, *, full: bool) -> ImageHeaders:
    """Read one image's (width, height, problem, detail, note)."""
    try:
        with open_entry(root, entry) as file:
            header = read_header(file)
            if full or not header.looks_complete:
                load_image(file)
    except ImageError as error:
        return 0, 0, *_refusal(entry.path, error), None
    except OSError as error:
        return 0, 0, "unreadable", error.strerror or str(error), None
    detail = header.profile_fault or None
    return header.width, header.height, None, detail, _notes(entry.path, header)


def _refusal(path: str, error: ImageError) -> tuple[str, str]:
    """Return why an image is not used; one without a known start may be of a kind that has none."""
    extension = posixpath.splitext(path)[1].lower()
    if error.reason == "not_an_image" and extension in (
        *UNREADABLE_EXTENSIONS,
        *BY_CONTENT_EXTENSIONS,
    ):
        return "unsupported", f"{extension} file"
    return error.reason, error.detail


def _notes(path: str, header: ImageHeader) -> str | None:
    notes = {
        "animated": header.is_animated,
        "wrong_extension": not path.lower().endswith(EXTENSIONS[header.format])
        and not is_table_row(path),
        "turned": header.has_orientation,
        "color_profile": header.is_converted,
        "broken_profile": bool(header.profile_fault),
    }
    return ",".join(name for name, applies in notes.items() if applies) or None
