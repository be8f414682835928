"""Tar shards: members read in place, whatever is hostile refused, the same records as a folder."""

import io
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from fakes_data import noise_image, png_header

from latentdiff.data.arrow.listing import Entry, open_entry
from latentdiff.data.buckets import make_buckets
from latentdiff.data.folder import shards
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.inspection.html_report import report_as_html
from latentdiff.data.inspection.inspect import make_data_report
from latentdiff.data.inspection.near_duplicates import find_near_duplicates
from latentdiff.image_io import load_image


def encoded(seed: int = 0, image_format: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    noise_image(seed, **kwargs).save(file, image_format)
    return file.getvalue()


def write_shard(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(*numbers: int) -> list[tuple[str, bytes]]:
    members = []
    for i in numbers:
        members += [(f"{i:04d}.png", encoded(i)), (f"{i:04d}.txt", f"image {i}".encode())]
    return members


def details(folder: Folder, key: str) -> list[str]:
    return [": ".join(example) for example in folder.problems[key].examples]


def test_shards_are_read_as_folders_of_their_members(tmp_path):
    write_shard(tmp_path / "train-00.tar", samples(0, 1))
    write_shard(tmp_path / "train-01.tar", samples(2))
    write_shard(tmp_path / "val-00.tar", samples(3))
    folder = read_folder(tmp_path)
    folder.check()
    assert [(r.id, r.captions[0], r.split, r.width) for r in folder] == [
        ("train-00.tar/0000.png", "image 0", "train", 40),
        ("train-00.tar/0001.png", "image 1", "train", 40),
        ("train-01.tar/0002.png", "image 2", "train", 40),
        ("val-00.tar/0003.png", "image 3", "validation", 40),
    ]
    assert [folder.read_bytes(i) for i in range(4)] == [encoded(i) for i in range(4)]
    assert folder.read_bytes_of("val-00.tar/0003.png") == encoded(3)
    with pytest.raises(KeyError):
        folder.read_bytes_of("val-00.tar/0004.png")
    np.testing.assert_array_equal(load_image(io.BytesIO(folder.read_bytes(1))), noise_image(1))


def test_captions_may_come_from_json_members(tmp_path):
    members = [
        ("a.jpg", encoded(0, "JPEG")),
        ("a.json", json.dumps({"caption": ["x", "y"], "width": 40}).encode()),
        ("sub/b.webp", encoded(1, "WEBP")),
        ("sub/b.json", json.dumps({"caption": "z"}).encode()),
    ]
    write_shard(tmp_path / "0.tar", members)
    folder = read_folder(tmp_path, caption_column="caption")
    assert [r.captions for r in folder] == [("x", "y"), ("z",)]
    folder = read_folder(tmp_path)
    assert details(folder, "no_column")[0].startswith('0.tar/a.json: no column "text"; ')
    assert details(folder, "no_column")[0].endswith("Fix: --data.caption_column=caption")


@pytest.mark.parametrize(
    "image_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_every_tar_dialect_with_long_and_unicode_names(tmp_path, image_format):
    long = "d" * 60 + "/" + ("x" * 70 if image_format == tarfile.USTAR_FORMAT else "é猫" * 60)
    with tarfile.open(tmp_path / "a.tar", "w", format=image_format) as tar:
        for name, data in [(f"{long}.png", encoded()), (f"{long}.txt", b"long")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    folder = read_folder(tmp_path)
    folder.check()
    assert [r.id for r in folder] == [f"a.tar/{long}.png"]
    assert folder.read_bytes(0) == encoded()


def test_members_of_other_kinds_are_left_alone_and_counted(tmp_path):
    mark = tmp_path.parent / "unpickled"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    members = [*samples(0), ("0000.pickle", pickle.dumps(Bomb())), ("0000.npy", b"x"), ("k", b"")]
    members += [("0000.cls", b"3"), ("._0000.png", b"mac"), ("x/.hidden.png", b"")]
    write_shard(tmp_path / "a.tar", members)
    folder = read_folder(tmp_path, full=True)
    folder.check()
    assert len(folder) == 1
    assert sorted(details(folder, "shard_ignored")) == [
        "a.tar: .cls: 1",
        "a.tar: .npy: 1",
        "a.tar: .pickle: 1",
        "a.tar: no extension: 1",
    ]
    assert not mark.exists()


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("../evil.png", b"x"), "leads out of the shard"),
        (("/etc/evil.png", b"x"), "leads out of the shard"),
        (("a/../../evil.png", b"x"), "leads out of the shard"),
        (("a/../evil.png", b"x"), "leads out of a folder"),
        (("..\\evil.png", b"x"), "leads out of the shard"),
        (special("evil.png", tarfile.SYMTYPE, "/etc/passwd"), "a link"),
        (special("evil.png", tarfile.LNKTYPE, "0000.png"), "a link"),
        (special("evil.png", tarfile.FIFOTYPE), "a sparse or special file"),
        (special("evil.png", tarfile.CHRTYPE), "a sparse or special file"),
        (("./0000.png", b"x"), "its name occurs twice"),
    ],
)
def test_hostile_members_are_refused_by_name(tmp_path, member, reason):
    write_shard(tmp_path / "a.tar", [*samples(0), member])
    folder = read_folder(tmp_path)
    assert [r.id for r in folder] == ["a.tar/0000.png"]
    (line,) = details(folder, "shard_member")
    assert reason in line
    with pytest.raises(ValueError, match="shard member that is refused"):
        folder.check()


def test_an_image_bomb_in_a_shard_is_refused_before_decoding(tmp_path):
    bomb = png_header(40_000, 40_000) + zlib.compress(b"\0" * 1_000_000)
    write_shard(tmp_path / "a.tar", [*samples(0), ("b.png", bomb), ("b.txt", b"x")])
    folder = read_folder(tmp_path, full=True)
    assert folder.problems["too_many_pixels"].examples[0][0] == "a.tar/b.png"


def test_a_sparse_member_that_claims_to_be_huge_is_refused(tmp_path):
    info = tarfile.TarInfo("evil.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    info.pax_headers |= {"GNU.sparse.name": "evil.png", "GNU.sparse.realsize": str(1 << 45)}
    body = b"1\n0\n5\n".ljust(512, b"\0") + b"hello"
    path = write_shard(tmp_path / "a.tar", [*samples(0), (info, body)])
    assert path.stat().st_size < 100_000
    folder = read_folder(tmp_path)
    assert "a sparse or special file" in details(folder, "shard_member")[0]


def test_a_header_that_claims_to_be_huge_is_not_read_into_memory(tmp_path):
    path = write_shard(tmp_path / "a.tar", samples(0))
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, 1 << 32
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + pax.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
    os.truncate(path, 1 << 33)  # sparse: takes no room
    folder = read_folder(tmp_path)
    assert "a header of 4,294,967,296 bytes" in details(folder, "broken_shard")[0]
    assert len(folder) == 1


@pytest.mark.parametrize("keep", [0.4, 0.7, 0.95])
def test_a_truncated_shard_is_named_and_its_whole_members_are_kept(tmp_path, keep):
    path = write_shard(tmp_path / "a.tar", samples(*range(10)))
    with tarfile.open(path) as tar:
        end = max(m.offset_data + m.size for m in tar.getmembers())
    os.truncate(path, int(end * keep))
    folder = read_folder(tmp_path)
    assert len(folder) in (int(10 * keep) - 1, int(10 * keep), int(10 * keep) + 1)
    assert details(folder, "broken_shard")[0].startswith("a.tar: after ")
    for i in range(len(folder)):
        assert folder.read_bytes(i) == encoded(int(Path(folder[i].id).stem))


def test_a_damaged_header_does_not_end_a_shard_in_silence(tmp_path):
    path = write_shard(tmp_path / "a.tar", samples(*range(4)))
    data = bytearray(path.read_bytes())
    at = data.index(b"0002.png")
    data[at : at + 8] = b"damaged!"
    path.write_bytes(data)
    folder = read_folder(tmp_path)
    assert details(folder, "broken_shard") == [
        f"a.tar: after 4 good members: no header at byte {at:,}"
    ]


@pytest.mark.parametrize(
    "data", [b"", b"not a tar file at all", b"\x1f\x8b gzip", os.urandom(2000)]
)
def test_a_file_that_is_no_tar_is_a_broken_shard(tmp_path, data):
    write_shard(tmp_path / "a.tar", samples(0))
    (tmp_path / "b.tar").write_bytes(data)
    folder = read_folder(tmp_path)
    assert details(folder, "broken_shard")[0].startswith("b.tar: after 0 good members")
    assert len(folder) == 1


def test_damaged_shards_never_raise_and_never_hang(tmp_path):
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in samples(0, 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    original = file.getvalue()
    headers = [original.index(name) for name in (b"0000.png", b"0000.txt", b"0001.png")]
    path = tmp_path / "a.tar"
    for _ in range(300):
        data = bytearray(original)
        for _ in range(int(rng.integers(1, 5))):
            data[int(rng.choice(headers)) + int(rng.integers(512))] = int(rng.integers(256))
        for header in headers:  # a right checksum lets more damage in
            if rng.random() < 0.7:
                block = data[header : header + 512]
                block[148:156] = b" " * 8
                data[header + 148 : header + 156] = b"%06o\0 " % sum(block)
        path.write_bytes(data)
        names, sizes, offsets, *_ = shards._read_shard(tmp_path, path.name)
        assert len(names) == len(sizes) == len(offsets)
        assert all(o + s <= len(data) for o, s in zip(offsets, sizes, strict=True))


def test_a_broken_image_in_a_shard_is_skipped_by_name(tmp_path):
    data = encoded(1)
    members = [*samples(0), ("b.png", data[:-30]), ("b.txt", b"b"), ("c.png", b""), ("c.txt", b"c")]
    write_shard(tmp_path / "a.tar", members)
    folder = read_folder(tmp_path)
    assert details(folder, "truncated")[0].startswith("a.tar/b.png: ")
    assert details(folder, "empty_file") == ["a.tar/c.png: 0 bytes"]
    assert folder.invalid_fraction == pytest.approx(2 / 3)


def test_shards_next_to_loose_images_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", samples(0))
    noise_image().save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"images next to tar shards: loose.png"):
        read_folder(tmp_path).check()


@pytest.mark.parametrize("name", ["a.tar.gz", "b.tgz", "c.zip", "d.tar.zst"])
def test_archives_that_are_not_read_are_named(tmp_path, name):
    write_shard(tmp_path / "a.tar", samples(0))
    (tmp_path / name).write_bytes(b"x")
    folder = read_folder(tmp_path)
    assert details(folder, "archive") == [f"{name}: "]
    folder.check()


@pytest.mark.parametrize(
    "root", ["pipe:cat x.tar", "https://host/x.tar", "s3://bucket/data", "hdfs://x", "gs://b/x"]
)
def test_only_local_folders_are_read(root):
    with pytest.raises(ValueError, match="only local folders are read"):
        read_folder(root)


def test_a_second_start_reads_no_shard(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_shard(root / "a.tar", samples(0, 1))
    write_shard(root / "b.tar", samples(2))
    cache = tmp_path / "cache"
    first = list(read_folder(root, cache_dir=cache))
    read = []
    real = shards._read_shard
    monkeypatch.setattr(
        shards, "_read_shard", lambda root, path: read.append(path) or real(root, path)
    )
    assert list(read_folder(root, cache_dir=cache)) == first
    assert read == []
    assert len(read_folder(root, cache_dir=cache, min_size=2)) == 3
    assert read == []
    write_shard(root / "b.tar", samples(2, 3))
    assert len(read_folder(root, cache_dir=cache)) == 4
    assert read == ["b.tar"]


def test_reports_and_comparisons_work_on_shards(tmp_path):
    big = {"width": 160, "height": 120}
    members = [("0000.png", encoded(0, **big)), ("0000.txt", b"same"), *samples(1)]
    write_shard(tmp_path / "train-0.tar", members)
    write_shard(tmp_path / "test-0.tar", [("x.jpg", encoded(0, "JPEG", **big)), ("x.txt", b"x")])
    folder = read_folder(tmp_path)
    groups = find_near_duplicates(folder)
    assert [[folder[i].id for i in g.indices] for g in groups] == [
        ["test-0.tar/x.jpg", "train-0.tar/0000.png"]
    ]
    buckets = make_buckets(32, multiple=16)
    report = make_data_report(folder, buckets=buckets, batch_size=2, duplicates=groups)
    assert report.duplicates[0].is_leak
    assert report_as_html(report, folder).count("<img ") >= 6


def test_a_member_is_a_file_that_ends_where_it_ends(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("a.txt", b"0123456789")])
    with tarfile.open(path) as tar:
        offset = tar.getmember("a.txt").offset_data
    with open_entry(tmp_path, Entry("a.tar/a.txt", 10, offset)) as file:
        assert file.read(4) == b"0123"
        assert file.read() == b"456789"
        assert file.seek(-3, io.SEEK_END) == 7
        assert file.read(100) == b"789"
        assert file.seek(50) == 50
        assert file.read() == b""


def test_a_shard_that_became_shorter_is_an_error(tmp_path):
    path = write_shard(tmp_path / "a.tar", samples(0))
    folder = read_folder(tmp_path)
    os.truncate(path, 600)
    with pytest.raises(OSError, match=r"a.tar/0000.png: expected .* bytes, got 88"):
        folder.read_bytes(0)
