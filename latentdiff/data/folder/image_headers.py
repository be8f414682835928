"""What each image's file holds, by its header or by decoding it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.arrow.stat_cache import cached_rows
from latentdiff.data.folder.files import LISTING, Entry, Progress, open_entry
from latentdiff.image_io import EXTENSIONS, ImageError, ImageHeader, load_image, read_header

NUM_THREADS = 4
# problem and note are keys of problems.REASONS; an image with a problem is left out.
HEADERS_FILE = pa.schema(
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
    name: str = "images",
    index: ScanIndex | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> pa.Table:
    """Find the facts of the images in `files` (columns of LISTING), one row of FACTS each.

    Headers are read, and files whose end looks wrong are decoded; `full` decodes all, also those
    that the index knows. name: of the table that the index remembers them in.
    """

    def read_some(entries: list[Entry]) -> list[ImageHeaders]:
        return [read_image_header(root, entry, full=full) for entry in entries]

    def read(entries: list[Entry]) -> list[ImageHeaders]:
        parts = [entries[i : i + 64] for i in range(0, len(entries), 64)]
        return [facts for some in threads.map(read_some, parts) for facts in some]

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return cached_rows(
            files,
            read,
            name=name,
            schema=HEADERS_FILE,
            index=index,
            again=full,
            progress=progress,
        )


def read_image_header(root: Path, entry: Entry, *, full: bool) -> ImageHeaders:
    """Read one image's (width, height, problem, detail, note)."""
    try:
        with open_entry(root, entry) as file:
            facts = read_header(file)
            if full or not facts.looks_complete:
                load_image(file)
    except ImageError as error:
        return 0, 0, error.reason, error.detail, None
    except OSError as error:
        return 0, 0, "unreadable", error.strerror or str(error), None
    return facts.width, facts.height, None, None, _note(entry.path, facts)


def _note(path: str, facts: ImageHeader) -> str | None:
    if facts.is_animated:
        return "animated"
    if not path.lower().endswith(EXTENSIONS[facts.format]):
        return "wrong_extension"
    return "turned" if facts.has_orientation else None
