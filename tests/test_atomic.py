"""A file appears whole or not at all."""

import os
from pathlib import Path

import pytest

from latentdiff.atomic import TEMPORARY, atomic_file, write_bytes, write_text


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
