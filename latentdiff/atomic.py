"""Files and folders that appear whole or not at all, however the process or the machine ends.

Each is written under a temporary name in the same folder, flushed to the disk and renamed. A folder
is locked while it is written, which tells the leftovers of a dead process from the work of a live
one. All have the mode that the umask gives new files, though some libraries write theirs as 0600.
Every module that must not leave half a file or folder writes through this one.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = "*.tmp"  # names of files that a killed process may leave behind
FAR = 1 << 30  # a byte past what lock files hold: Windows lets nobody read a byte that is locked


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to, which then becomes `path`, in place of an older file.

    The temporary name is new each time, so that several processes may write the same file. When
    writing fails, the temporary file is removed and the error is raised. The folder must exist.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = _mode(temporary)
        yield temporary
        temporary.chmod(mode)
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


TEMPORARY_FOLDER, REPLACED = ".saving-", ".replaced"


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Give a temporary folder to write into, which then becomes `final`, in place of an older one.

    When writing fails, the temporary folder is removed and the error is raised. If `final` existed
    before, either `final` or `final.replaced` is whole at every moment.
    """
    folder = _temporary(final.parent)
    folder.mkdir(parents=True)
    try:
        with _locked(folder):
            yield folder
            _apply_umask(folder)
            for path in (*folder.rglob("*"), folder):
                _flush(path)
            _publish(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Give a temporary folder whose files then take their places in `folder`, next to others there.

    A new folder appears as a whole; in an older one each file does.
    """
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            yield temporary
        return
    written = _temporary(folder) / "files"
    written.parent.mkdir()
    try:
        with atomic_folder(written) as temporary:
            yield temporary
        for path in sorted(written.rglob("*")):
            place = folder / path.relative_to(written)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            else:
                os.replace(path, place)
    finally:
        shutil.rmtree(written.parent, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; a kill half way leaves no part of the folder under its name."""
    doomed = _temporary(path.parent)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(root: Path) -> None:
    """Remove the leftovers of dead processes; restore a folder whose replacement is missing.

    root: owned by this process; folders that another of its threads is writing are kept.
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


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _apply_umask(folder: Path) -> None:
    """Give what is in a new folder the modes that follow from the folder's own."""
    mode = _mode(folder)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(mode if path.is_dir() else mode & 0o666)


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
    """Make the disk hold a file's bytes or a folder's list of names; Windows opens no folder."""
    if fcntl is None and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock a file or folder until its descriptor is closed or its process dies; False when taken.

    Raises OSError on a file system without locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder inside the block; False when it is taken, True where there are no locks."""
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            is_ours = try_lock(descriptor)
        except OSError:
            is_ours = True  # the run folder's own lock has to do
        yield is_ours
    finally:
        os.close(descriptor)


def _is_being_written(folder: Path) -> bool:
    try:
        with _locked(folder) as is_ours:
            return not is_ours
    except OSError:
        return False
