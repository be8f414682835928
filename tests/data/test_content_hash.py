"""Hashes of files are taken once, whichever images are chosen."""

from pathlib import Path

import pytest
from fakes_data import save_image, write_jsonl

from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.folder import content_hash
from latentdiff.data.folder.content_hash import file_hashes
from latentdiff.data.folder.folder import Folder, read_folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the files that were read to be hashed."""
    found: list[str] = []
    read_entry = content_hash.read_entry

    def read(root: Path, entry: object) -> bytes:
        found.append(entry.path)  # type: ignore[attr-defined]  # an Entry
        return read_entry(root, entry)

    monkeypatch.setattr(content_hash, "read_entry", read)
    return found


def folder_of(root: Path, num: int, **rules: object) -> Folder:
    for number in range(num):
        if not (root / f"{number}.png").exists():
            save_image(root / f"{number}.png", number)
    rows = [{"file_name": f"{number}.png", "text": "one"} for number in range(num)]
    write_jsonl(root / "metadata.jsonl", rows)
    return read_folder(root, **rules)


def test_a_file_is_read_once_whichever_images_are_chosen(tmp_path: Path, reads: list[str]) -> None:
    root, index = tmp_path / "data", ScanIndex(tmp_path / "cache", tmp_path / "data")
    before = file_hashes(folder_of(root, 6), index=index)
    assert len(reads) == 6
    for fraction in (0.3, 0.6):
        part = folder_of(root, 6, heldout_fraction=fraction)
        for split in (part.split("train"), part.heldout()):
            file_hashes(split, index=index)
    assert len(reads) == 6
    after = file_hashes(folder_of(root, 7), index=index)
    assert reads[6:] == ["6.png"]
    assert (after[:6] == before).all()
    save_image(root / "3.png", 99)
    assert (file_hashes(folder_of(root, 7), index=index)[3] != before[3]).any()
    assert reads[7:] == ["3.png"]
