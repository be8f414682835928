"""A file appears whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.atomic import (
    TEMPORARY,
    atomic_file,
    atomic_files,
    atomic_folder,
    write_bytes,
    write_text,
)


def test_content_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"\x00old")
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_failed_write_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        write_half()
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_file_is_on_the_disk_before_it_bears_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("flush"), flush(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), rename(*names)))
    write_text(tmp_path / "file", "new")
    assert calls == ["flush", "rename"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as one, atomic_file(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert sorted(tmp_path.glob(TEMPORARY)) == sorted([one, other])
    assert path.read_text() == "one"  # the outer one came last


def test_missing_folder_is_said_by_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "file", "x")


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"),
    [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)],
)
@pytest.mark.parametrize("older", [False, True])
def test_modes_are_those_that_the_umask_gives(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int, older: bool
) -> None:
    before = os.umask(umask)
    try:
        if older:
            (tmp_path / "files" / "inner").mkdir(parents=True)
        with atomic_file(tmp_path / "alone.safetensors") as file:
            save_file({"x": torch.ones(1)}, file)  # safetensors' own are 0600
        for write, name in ((atomic_folder, "folder"), (atomic_files, "files")):
            with write(tmp_path / name) as folder:
                (folder / "inner").mkdir(mode=0o700)
                save_file({"x": torch.ones(1)}, folder / "inner" / "x.safetensors")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes.pop("inner") == folder_mode
    assert modes == {
        "alone.safetensors": file_mode,
        "x.safetensors": file_mode,
        "folder": folder_mode,
        "files": folder_mode,
    }


def test_files_join_a_folder_and_leave_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text in ("old", "new"):
        with atomic_files(folder) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "file").write_text(text)
        (folder / "own").write_text("mine")
        assert (folder / "inner" / "file").read_text() == text

    def write_half() -> None:
        with atomic_files(folder) as temporary:
            (temporary / "other").write_text("half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert sorted(p.name for p in folder.rglob("*")) == ["file", "inner", "own"]
    assert list(tmp_path.iterdir()) == [folder]
