"""Which files a folder holds: their paths, sizes and times, and the links it refuses."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import composed, find_strings, has_extension
from latentdiff.data.arrow.listing import TABLES, ListingBuilder
from latentdiff.data.folder.problems import Problems
from latentdiff.image_io import IMAGE_EXTENSIONS

TEXT_EXTENSIONS = (".txt", ".caption", ".json")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def list_files(
    root: Path, *, follow_links: bool, problems: Problems, exclude: Path | None = None
) -> pa.Table:
    """List the regular files below `root`: rows of LISTING, sorted by path.

    Names that start with a dot, and files in the folder `exclude`, are ignored. A link to a
    image, caption or folder outside `root` is a problem unless `follow_links`; so are broken
    links, names that are not UTF-8, and folders that cannot be opened.
    """
    listing = ListingBuilder()
    real_root = os.path.realpath(root)
    walk = _Walk(real_root, follow_links=follow_links, problems=problems)
    if exclude is not None:
        walk.entered.add(os.path.realpath(exclude))
    for path, status in walk.files(str(root)):
        listing.add(path, size=status.st_size, mtime_ns=status.st_mtime_ns)
    return listing.table().sort_by("path").combine_chunks()


def report_same_names(paths: pa.Array, problems: Problems) -> None:
    """Note images whose names differ in nothing but their Unicode form."""
    is_plain = pc.string_is_ascii(paths).to_numpy(zero_copy_only=False)
    if is_plain.all():
        return
    places = np.flatnonzero(~is_plain & has_extension(paths, IMAGE_EXTENSIONS))
    names = composed(paths.take(pa.array(places)))
    first = find_strings(names, names)
    for i in np.flatnonzero(first != np.arange(len(first))):
        pair = [ascii(paths[int(places[place])].as_py()) for place in (first[i], i)]
        problems.add("same_name", names[int(i)].as_py(), " and ".join(pair))


def existing_path(path: Path) -> Path:
    """Give the path of what is on disk where `path` names it in another Unicode form."""
    if path.exists() or str(path).isascii():
        return path
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        same = [part]
        if found.is_dir() and not (found / part).exists():
            same = [name for name in os.listdir(found) if _nfc(name) == _nfc(part)] or same
        found = found / same[0]
    return found


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def is_image_name(path: str) -> bool:
    """Return whether a file's extension claims that it is an image."""
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS


class _Walk:
    """One walk over a folder; it enters no folder twice, so that links make no loop."""

    def __init__(self, real_root: str, *, follow_links: bool, problems: Problems) -> None:
        self.real_root = real_root
        self.follow_links = follow_links
        self.problems = problems
        self.entered: set[str] = set()

    def files(self, root: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the files below `root` in no order, with their paths relative to it."""
        waiting = [(root, "")]
        while waiting:
            folder, prefix = waiting.pop()
            real = os.path.realpath(folder)
            if real in self.entered:
                continue
            self.entered.add(real)
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        yield from self._entry(entry, prefix, waiting)
            except OSError as error:
                self.problems.add("unreadable_folder", prefix or ".", error.strerror or "")

    def _entry(
        self, entry: os.DirEntry[str], prefix: str, waiting: list[tuple[str, str]]
    ) -> Iterator[tuple[str, os.stat_result]]:
        name, path = entry.name, prefix + entry.name
        if name.startswith("."):
            return
        if not is_utf8(name):
            self.problems.add("name_not_utf8", ascii(path))
            return
        if entry.is_symlink() and not self._may_follow(entry, path):
            return
        if entry.is_dir():
            waiting.append((entry.path, path + "/"))
            return
        try:
            status = entry.stat()
        except FileNotFoundError:
            return  # it was removed in the meantime
        if stat.S_ISREG(status.st_mode):
            yield path, status
        elif is_image_name(name):
            self.problems.add("not_a_file", path)

    def _may_follow(self, entry: os.DirEntry[str], path: str) -> bool:
        target = os.path.realpath(entry.path)
        matters = entry.is_dir() or is_image_name(path) or entry.name in METADATA_NAMES
        matters = matters or path.endswith((*TEXT_EXTENSIONS, *TABLES, ".tar"))
        if not os.path.exists(target):
            if matters:
                self.problems.add("link_broken", path, f"points to {target}")
            return False
        if self.follow_links:
            return True
        if not (target + os.sep).startswith(self.real_root + os.sep):
            if matters:
                self.problems.add("link_leaves", path, f"points to {target}")
            return False
        if entry.is_dir():
            self.problems.add("link_folder", path)
            return False
        return True


def is_utf8(name: str) -> bool:
    """Return whether a file name, as Python decodes it, was valid UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
