"""A file that appears whole or not at all, however the process or the machine ends.

It is written under a temporary name beside its own, flushed to the disk and renamed. A new folder
likewise, but for the flushing; folders that replace others, or that a power cut may not cost, are
atomic.py's business.

A folder that appears whole or not at all, however the process or the machine ends.

It is written under a temporary name, its files and itself are flushed to the disk, it is renamed,
and its parent is flushed. What a dead process left behind is told from what a live one is writing
by a lock, and removed by `clean`.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = "*.tmp"  # what a killed process may leave behind


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to, which then becomes `path`, in place of an older file.

    Its name is new each time, so that several processes may write the same file. When writing fails
    the temporary file is removed and the error goes on. The folder must exist.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file as a whole."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file as a whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to write into, which then becomes `path`, where nothing is yet.

    When writing fails it is removed and the error goes on.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


TEMPORARY_FOLDER, REPLACED = ".saving-", ".replaced"


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Give a temporary folder to write into, which then becomes `final`, in place of an older one.

    When writing fails the temporary folder is removed and the error goes on. At every moment either
    `final` or `final.replaced` is whole, if `final` was there before.
    """
    folder = _temporary(final.parent)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield folder
        for path in (*folder.rglob("*"), folder):
            _flush(path)
        _publish(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Delete a folder; a kill half way leaves no part of it under its name."""
    doomed = _temporary(path.parent)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(root: Path) -> None:
    """Remove what dead processes left in `root`; take back a folder whose replacement never came.

    For the one process that owns `root`; what another thread of it is writing stays.
    """
    for path in root.glob(f"{TEMPORARY_FOLDER}*"):
        if not _is_being_written(path):
            shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(f"*{REPLACED}"):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)


def file_hash(path: Path) -> dict[str, int | str]:
    """Return the size in bytes and the sha256 (hex) of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _temporary(parent: Path) -> Path:
    return parent / f"{TEMPORARY_FOLDER}{secrets.token_hex(8)}"


def _publish(folder: Path, final: Path) -> None:
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make the disk hold a file's bytes or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a folder until its descriptor is closed or its process dies; False when it is taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks; the run folder's own lock has to do
    return True


def _is_being_written(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)
