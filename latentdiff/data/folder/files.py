"""Opening one file of a folder: a file of its own, or a member of a tar shard at a byte offset.

Which files a folder holds: their paths, sizes and times, and the links it refuses.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa

from latentdiff.data.arrow.columns import CHUNK
from latentdiff.data.folder.problems import Problems

ALONE = -1  # the offset of a file that is no member of a shard
SHARD = ".tar/"  # stands between a shard's path and its member's name


class Entry(NamedTuple):
    """A file or member: path (of a member shard.tar/name), bytes, and offset, or ALONE."""

    path: str
    size: int
    offset: int = ALONE


def open_entry(root: Path, entry: Entry) -> BinaryIO:
    """Open a file for reading; of a member, nothing beyond it can be read."""
    if entry.offset == ALONE:
        return open(root / entry.path, "rb")
    member = _Member(root / shard_of(entry.path), entry.offset, entry.size)
    return cast(BinaryIO, io.BufferedReader(member))


def read_entry(root: Path, entry: Entry) -> bytes:
    """Read a whole file or member. Raises OSError where a shard has become shorter."""
    if entry.offset == ALONE:
        return (root / entry.path).read_bytes()
    with open_entry(root, entry) as file:
        data = file.read()
    if len(data) != entry.size:
        raise OSError(f"{entry.path}: expected {entry.size:,} bytes, got {len(data):,}")
    return data


def shard_of(path: str) -> str:
    """Name the shard of a member's path."""
    return path[: path.index(SHARD) + len(SHARD) - 1]


class _Member(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + position)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer
        num = min(len(buffer), max(0, self._size - self._position))
        data = os.pread(self._file.fileno(), num, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"),
    *(".pgm", ".avif"),
    *(".heic", ".heif", ".jp2", ".svg"),  # to say that they cannot be used
)
TEXT_EXTENSIONS = (".txt", ".caption", ".json")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
Progress = Callable[[int, int], None]  # (done, total)
LISTING = pa.schema(
    [
        ("path", pa.large_string()),  # posix, relative to the root
        ("size", pa.int64()),  # bytes
        ("mtime_ns", pa.int64()),  # of a shard's member: the shard's
        ("offset", pa.int64()),  # in the shard, or files.ALONE
    ]
)


def list_files(
    root: Path, *, follow_links: bool, problems: Problems, exclude: Path | None = None
) -> pa.Table:
    """List the regular files below `root`: rows of LISTING, sorted by path.

    Names that start with a dot, and what lies in the folder `exclude`, are passed over. A link to a
    image, caption or folder outside `root` is a problem unless `follow_links`; so are broken
    links, names that are not UTF-8, and folders that cannot be opened.
    """
    columns = Columns()
    real_root = os.path.realpath(root)
    walk = _Walk(real_root, follow_links=follow_links, problems=problems)
    if exclude is not None:
        walk.entered.add(os.path.realpath(exclude))
    for path, status in walk.files(str(root)):
        columns.add(path, size=status.st_size, mtime_ns=status.st_mtime_ns)
    return columns.table().sort_by("path").combine_chunks()


def is_image_name(path: str) -> bool:
    """Say whether a file's extension claims that it is an image."""
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS


@dataclass
class Columns:
    """Rows of LISTING gathered into arrow chunks, so that a million take little memory."""

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    batches: list[pa.RecordBatch] = field(default_factory=list)

    def add(self, path: str, *, size: int, mtime_ns: int, offset: int = ALONE) -> None:
        self.paths.append(path)
        self.sizes.append(size)
        self.times.append(mtime_ns)
        self.offsets.append(offset)
        if len(self.paths) >= CHUNK:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self.batches, LISTING)

    def _flush(self) -> None:
        columns = [self.paths, self.sizes, self.times, self.offsets]
        self.batches.append(pa.record_batch(columns, schema=LISTING))
        self.paths, self.sizes, self.times, self.offsets = [], [], [], []


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
        matters = entry.is_dir() or is_image_name(path) or path.endswith((*TEXT_EXTENSIONS, ".tar"))
        matters = matters or entry.name in METADATA_NAMES
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
    """Say whether a file name, as Python decodes it, was valid UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
