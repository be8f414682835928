"""The scan index: a second start opens only what changed, and finds the same."""

import json
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fakes_data import captioned_folder, save_image

from latentdiff.data import image_headers
from latentdiff.data.arrow.listing import Entry
from latentdiff.data.arrow.scan_index import ScanIndex, map_table
from latentdiff.data.folder import sidecars
from latentdiff.data.folder.folder import read_folder


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files that a scan opens."""
    names: list[str] = []
    real_header, real_text = image_headers.read_image_header, sidecars._read

    def header(root: Path, entry: Entry, *, full: bool):
        names.append(Path(entry.path).name)
        return real_header(root, entry, full=full)

    def text(root: Path, entry: Entry, **settings: str):
        names.append(Path(entry.path).name)
        return real_text(root, entry, **settings)

    monkeypatch.setattr(image_headers, "read_image_header", header)
    monkeypatch.setattr(sidecars, "_read", text)
    return names


def mixed_folder(root: Path) -> Path:
    captioned_folder(root, 4)
    for i in range(3):
        save_image(root / f"s/{i}.png", 10 + i)
        (root / f"s/{i}.txt").write_text(f"side {i}")
    (root / "3.png").write_bytes(b"")
    return root


def test_a_second_start_opens_nothing_and_finds_the_same(tmp_path, opened):
    root = mixed_folder(tmp_path / "data")
    plain = read_folder(root)
    assert len(opened) == 4 + 3 + 3
    first = read_folder(root, cache_dir=tmp_path / "cache")
    opened.clear()
    second = read_folder(root, cache_dir=tmp_path / "cache")
    assert opened == []
    assert list(plain) == list(first) == list(second)
    assert plain.num_found == second.num_found == 7
    assert plain.problems.to_json() == first.problems.to_json() == second.problems.to_json()


def test_only_changed_files_are_opened_again(tmp_path, opened):
    root = mixed_folder(tmp_path / "data")
    read_folder(root, cache_dir=tmp_path / "cache")
    opened.clear()
    save_image(root / "1.png", 7, width=99)
    save_image(root / "s/new.png", 8)
    (root / "s/new.txt").write_text("new")
    (root / "s/2.txt").write_text("other")
    (root / "s/0.png").unlink()
    os.utime(root / "2.png", ns=(1, 1))
    folder = read_folder(root, cache_dir=tmp_path / "cache")
    assert sorted(opened) == ["1.png", "2.png", "2.txt", "new.png", "new.txt"]
    assert list(folder) == list(read_folder(root))
    assert folder[1].width == 99


def test_other_settings_open_no_file_but_judge_anew(tmp_path, opened):
    root = mixed_folder(tmp_path / "data")
    read_folder(root, cache_dir=tmp_path / "cache")
    opened.clear()
    folder = read_folder(root, cache_dir=tmp_path / "cache", min_size=1000)
    assert opened == []
    assert len(folder) == 0
    assert folder.problems["too_small"].count == 6
    assert len(read_folder(root, cache_dir=tmp_path / "cache")) == 6


def test_full_opens_everything_again(tmp_path, opened):
    root = captioned_folder(tmp_path / "data", 4)
    read_folder(root, cache_dir=tmp_path / "cache")
    data = bytearray((root / "1.png").read_bytes())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    status = (root / "1.png").stat()
    (root / "1.png").write_bytes(data)
    os.utime(root / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    opened.clear()
    assert len(read_folder(root, cache_dir=tmp_path / "cache")) == 4, "nothing to see from outside"
    assert len(read_folder(root, cache_dir=tmp_path / "cache", full=True)) == 3
    assert len(opened) == 4
    assert len(read_folder(root, cache_dir=tmp_path / "cache")) == 3, "and the index stores it"


def test_trust_index_does_not_look_at_the_files(tmp_path, monkeypatch):
    root = captioned_folder(tmp_path / "data", 3)
    first = read_folder(root, cache_dir=tmp_path / "cache")
    (root / "metadata.jsonl").unlink()
    trusted = read_folder(root, cache_dir=tmp_path / "cache", trust_index=True)
    assert list(trusted) == list(first)
    assert not read_folder(root, cache_dir=tmp_path / "cache")
    nothing = read_folder(root, cache_dir=tmp_path / "other", trust_index=True)
    assert len(nothing) == 0, "without an index the files are looked at"


@pytest.mark.parametrize("damage", [b"", b"ARROW1\0\0 and then nothing", b"\0" * 500])
def test_a_damaged_index_is_the_same_as_none(tmp_path, damage):
    root = mixed_folder(tmp_path / "data")
    first = read_folder(root, cache_dir=tmp_path / "cache")
    expected = list(first)
    for path in (tmp_path / "cache").rglob("*.arrow"):
        path.unlink()
        path.write_bytes(damage)
    assert list(read_folder(root, cache_dir=tmp_path / "cache")) == expected


def test_files_that_could_not_be_read_are_tried_again(tmp_path, opened, monkeypatch):
    root = captioned_folder(tmp_path / "data", 2)
    real = image_headers.read_image_header
    denied = (0, 0, "unreadable", "Permission denied", None)

    def broken_header(root: Path, entry: Entry, *, full: bool):
        return denied if entry.path == "1.png" else real(root, entry, full=full)

    monkeypatch.setattr(image_headers, "read_image_header", broken_header)
    assert len(read_folder(root, cache_dir=tmp_path / "cache")) == 1
    monkeypatch.setattr(image_headers, "read_image_header", real)
    opened.clear()
    assert len(read_folder(root, cache_dir=tmp_path / "cache")) == 2
    assert opened == ["1.png"]


def test_an_index_that_cannot_be_written_is_said_and_done_without(tmp_path, caplog):
    root = captioned_folder(tmp_path / "data", 2)
    (tmp_path / "file").touch()
    assert len(read_folder(root, cache_dir=tmp_path / "file")) == 2
    assert "the scan index is not kept" in caplog.text


def test_an_index_inside_the_folder_is_no_part_of_it(tmp_path, opened):
    root = captioned_folder(tmp_path, 2)
    for _ in range(2):
        folder = read_folder(root, cache_dir=root / "cache")
        assert len(folder) == 2
        assert not folder.problems
    assert len(opened) == 2


def test_a_mapped_folder_is_sent_to_workers_by_name(tmp_path):
    root = captioned_folder(tmp_path / "data", 200, width=8, height=8)
    plain = read_folder(root)
    mapped = read_folder(root, cache_dir=tmp_path / "cache")
    part = mapped.select(np.array([7, 3]))
    assert len(pickle.dumps(part)) < 2000 < len(pickle.dumps(plain.select(np.array([7, 3]))))
    assert list(pickle.loads(pickle.dumps(part))) == list(part)
    assert list(pickle.loads(pickle.dumps(plain))) == list(plain)
    for path in (tmp_path / "cache").rglob("records-*.arrow"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="start again"):
        pickle.loads(pickle.dumps(part))


def test_old_tables_are_pruned(tmp_path):
    root = captioned_folder(tmp_path / "data", 1)
    for size in range(1, 9):
        read_folder(root, cache_dir=tmp_path / "cache", min_size=size)
    assert len(list((tmp_path / "cache").rglob("records-*.arrow"))) == 4
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_two_folders_of_one_name_have_two_indexes(tmp_path):
    captioned_folder(tmp_path / "a/data", 1)
    captioned_folder(tmp_path / "b/data", 2)
    for _ in range(2):
        assert len(read_folder(tmp_path / "a/data", cache_dir=tmp_path / "cache")) == 1
        assert len(read_folder(tmp_path / "b/data", cache_dir=tmp_path / "cache")) == 2


def test_the_index_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read_folder(captioned_folder(tmp_path / "data", 1), cache_dir="~/cache")
    assert list((tmp_path / "home/cache").rglob("*.arrow"))


def test_tables_are_mapped_not_read(tmp_path):
    index = ScanIndex(tmp_path, tmp_path)
    big = pa.table({"x": pa.array(range(500_000), pa.int64())})
    index.save("big", big.schema, parts=[big])
    del big
    before = pa.total_allocated_bytes()
    table = map_table(index.path("big"))
    assert table is not None
    assert len(table) == 500_000
    assert pa.total_allocated_bytes() - before < 100_000


def test_many_records_are_made_one_at_a_time(tmp_path):
    num = 3000
    image = save_image(tmp_path / "data/.pool/p.png", width=8, height=8)
    rows = []
    for i in range(num):
        name = f"{i // 1000}/{i:06d}.png"
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        os.link(image, tmp_path / "data" / name)
        rows.append(json.dumps({"file_name": name, "text": f"number {i}"}))
    (tmp_path / "data/metadata.jsonl").write_text("\n".join(rows))
    folder = read_folder(tmp_path / "data", cache_dir=tmp_path / "cache")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    again = read_folder(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert len(again) == num
    assert again[num - 1] == folder[num - 1]
    assert again[1234].captions == ("number 1234",)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
