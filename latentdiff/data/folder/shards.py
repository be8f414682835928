"""Webdataset shards: tar files whose members are read in place, by byte offset.

cat.jpg and cat.txt (or cat.json) in a shard are an image and its caption, as they would be in a
folder. Shards are local, uncompressed files; nothing is unpacked to disk, no member is ever
unpickled, and only images, .txt, .caption and .json members are read. Links, devices, sparse files
and names that lead out of the shard are refused. Ours: webdataset streams shards in order; an order
that is the same for any number of processes needs each member by its offset.
"""

import io
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import combined, has_extension, iter_py
from latentdiff.data.arrow.listing import LISTING, Progress
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.arrow.stat_cache import cached_rows
from latentdiff.data.folder.files import TEXT_EXTENSIONS, is_image_name, is_utf8
from latentdiff.data.folder.problems import Problems
from latentdiff.html import printable
from latentdiff.image_io import IMAGE_EXTENSIONS

MEMBER_EXTENSIONS = IMAGE_EXTENSIONS + TEXT_EXTENSIONS
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
MAX_MEMBER_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
# What tarfile raises on damaged headers, found by feeding it damaged shards.
TAR_ERRORS = (tarfile.TarError, ValueError, EOFError, OSError, OverflowError, RecursionError)
PROBLEM = pa.struct([("key", pa.string()), ("where", pa.large_string()), ("detail", pa.string())])
SHARDS = pa.schema(
    [
        *LISTING,
        pa.field("names", pa.large_list(pa.large_string())),
        pa.field("sizes", pa.large_list(pa.int64())),
        pa.field("offsets", pa.large_list(pa.int64())),
        pa.field("problems", pa.large_list(PROBLEM)),
        pa.field("problem", pa.string()),  # of the whole shard
    ]
)


def expand_shards(
    root: Path,
    listing: pa.Table,
    *,
    problems: Problems,
    index: ScanIndex | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """Put the members of shards in their places in a listing: path shard.tar/name, and the offset.

    Only shards that `index` does not know by path, size and time are read.
    """
    paths = combined(listing["path"])
    for name in iter_py(paths, np.flatnonzero(has_extension(paths, ARCHIVES))):
        problems.add("archive", name)
    is_shard = has_extension(paths, [".tar"])
    if not is_shard.any():
        return listing
    loose = listing.filter(pa.array(~is_shard))
    _refuse_mixture(loose, problems)
    tars = listing.filter(pa.array(is_shard)).combine_chunks()
    shards = cached_rows(
        tars,
        lambda entry: _read_shard(root, entry.path),
        name="shards-2",  # raise it when other members are listed
        schema=SHARDS,
        index=index,
        progress=progress,
    )
    for name in iter_py(combined(shards["path"].filter(shards["problem"].is_valid()))):
        problems.add("unreadable", name)
    for found in shards["problems"].to_pylist():
        for problem in found:
            problems.add(problem["key"], problem["where"], problem["detail"])
    return pa.concat_tables([loose, _members(shards)]).sort_by("path").combine_chunks()


def _refuse_mixture(loose: pa.Table, problems: Problems) -> None:
    for name in iter_py(combined(loose["path"])):
        if is_image_name(name):
            problems.add("mixed_shards", name)
            return


def _members(shards: pa.Table) -> pa.Table:
    """Lay out the members of all shards as rows of LISTING."""
    names = combined(shards["names"])
    parents = pc.list_parent_indices(names)
    above = combined(shards["path"]).take(parents)
    columns = [
        pc.binary_join_element_wise(above, names.flatten(), pa.scalar("/", pa.large_string())),
        combined(shards["sizes"]).flatten(),
        combined(shards["mtime_ns"]).take(parents),
        combined(shards["offsets"]).flatten(),
    ]
    return pa.table(columns, schema=LISTING)


def _read_shard(root: Path, path: str) -> tuple[object, ...]:
    """Index one shard: its members' names, sizes, offsets, and their problems."""
    names: list[str] = []
    sizes: list[int] = []
    offsets: list[int] = []
    found: list[dict[str, str]] = []
    ignored: Counter[str] = Counter()
    seen: set[str] = set()
    try:
        for member in _headers(root / path):
            name = posixpath.normpath(member.name)
            if member.isdir():
                continue
            if problem := _refusal(member, name, seen):
                where = f"{path}/{printable(member.name)}"
                found.append({"key": "shard_member", "where": where, "detail": problem})
            elif posixpath.basename(name).startswith("."):
                continue
            elif name.lower().endswith(MEMBER_EXTENSIONS):
                seen.add(name)
                names.append(name)
                sizes.append(member.size)
                offsets.append(member.offset_data)
            else:
                ignored[posixpath.splitext(name)[1]] += 1
    except PermissionError:
        return [], [], [], [], "unreadable"
    except TAR_ERRORS as error:
        detail = f"after {len(names):,} good members: {error}"
        found.append({"key": "broken_shard", "where": path, "detail": detail})
    for extension, count in ignored.items():
        detail = f"{extension or 'no extension'}: {count:,}"
        found.append({"key": "shard_ignored", "where": path, "detail": detail})
    return names, sizes, offsets, found, None


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield a tar file's members in order. Raises one of TAR_ERRORS at a broken header."""
    with _ShardFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        size, last = path.stat().st_size, -1
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.offset <= last:
                raise tarfile.ReadError(f"a header at byte {last:,} leads back")
            if member.offset_data + member.size > size and not member.issparse():
                raise tarfile.ReadError(f"{member.name} ends beyond the end of the file")
            last = member.offset
            yield member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {tar.offset:,}")


def _refusal(member: tarfile.TarInfo, name: str, seen: set[str]) -> str | None:
    """Return why a member must not be used, or None."""
    if member.issparse() or not member.isreg():
        kind = "link" if member.issym() or member.islnk() else "sparse or special file"
        return f"a {kind}"
    if member.name.startswith("/") or "\\" in name or name.split("/", maxsplit=1)[0] in ("..", ""):
        return "its name leads out of the shard"
    if ".." in member.name.split("/"):
        return "its name leads out of a folder"
    if name in seen:
        return "its name occurs twice"
    if member.size > MAX_MEMBER_BYTES:
        return f"{member.size:,} bytes"
    return None if is_utf8(name) else "its name is not UTF-8"


class _ShardFile(io.FileIO):
    """A file that refuses a header's claim to be enormous, which tarfile would read at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(-1 if size is None else size)
