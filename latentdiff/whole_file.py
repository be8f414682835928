"""A file that appears whole or not at all, however the process or the machine ends.

It is written under a temporary name beside its own, flushed to the disk and renamed. Folders that
appear whole are training/atomic.py's business.
"""

import contextlib
import os
import secrets
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
