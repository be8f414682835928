"""A file that appears whole or not at all, however the process or the machine ends.

It is written under a temporary name beside its own, flushed to the disk and renamed. A new folder
likewise, but for the flushing; folders that replace others, or that a power cut may not cost, are
training/atomic.py's business.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = "*.tmp"  # what a killed process may leave behind


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
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
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file as a whole."""
    with whole_file(path) as temporary:
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
