"""Reading a captioned folder: each convention, each fault by name, splits and links."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes_data import captioned_folder, noise_image, png_header, save_image, write_jsonl
from PIL import Image

from latentdiff.data import image_headers
from latentdiff.data.arrow.listing import ALONE
from latentdiff.data.folder import folder as folder_module
from latentdiff.data.folder.folder import Folder, Record, read_folder

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")


def problem(folder: Folder, key: str) -> tuple[int, str]:
    """How many, and the first as one text."""
    group = folder.problems[key]
    return group.count, ": ".join(group.examples[0])


def refused(root: Path, match: str, **settings) -> None:
    with pytest.raises(ValueError, match=match):
        read_folder(root, **settings).check()


# ---- conventions ----


def test_metadata_jsonl(tmp_path):
    folder = read_folder(captioned_folder(tmp_path, 3))
    assert not folder.problems
    assert folder[0] == Record("0.png", tmp_path / "0.png", ("image 0",), 40, 32, "train")
    assert [record.id for record in folder] == ["0.png", "1.png", "2.png"]
    assert folder.widths.tolist() == [40] * 3
    assert folder.read_bytes(1) == (tmp_path / "1.png").read_bytes()
    assert folder[-1].id == "2.png"
    assert [record.id for record in folder[1:]] == ["1.png", "2.png"]
    folder.check()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_metadata_csv_and_parquet(tmp_path, suffix):
    captions = ['a "red", round thing', "two\nlines", "日本語"]
    for i in range(3):
        save_image(tmp_path / f"{i}.png", i)
    table = pa.table({"file_name": [f"{i}.png" for i in range(3)], "prompt": captions})
    if suffix == "csv":
        rows = [f'{i}.png,"{c.replace(chr(34), chr(34) * 2)}"' for i, c in enumerate(captions)]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,prompt", *rows]))
    else:
        pq.write_table(table, tmp_path / "metadata.parquet")
    folder = read_folder(tmp_path, caption_column="prompt")
    assert [record.captions[0] for record in folder] == [
        'a "red", round thing',
        "two lines",
        "日本語",
    ]
    folder.check()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_list_column_gives_several_captions(tmp_path, suffix):
    save_image(tmp_path / "a.png")
    row = {"file_name": "a.png", "captions": ["one", "two"]}
    if suffix == "jsonl":
        write_jsonl(tmp_path / "metadata.jsonl", [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "metadata.parquet")
    assert read_folder(tmp_path, caption_column="captions")[0].captions == ("one", "two")


def test_sidecars(tmp_path):
    for i, name in enumerate(["a.jpg", "sub/b.png", "c.PNG"]):
        save_image(tmp_path / name.lower(), i)
        (tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat\nasleep\n")
    (tmp_path / "sub/b.caption").write_text("a dog")
    (tmp_path / "c.TXT").write_text("a fish")
    folder = read_folder(tmp_path)
    assert {record.id: record.captions for record in folder} == {
        "a.jpg": ("a cat asleep",),
        "c.PNG": ("a fish",),
        "sub/b.png": ("a dog",),
    }
    folder.check()
    assert read_folder(tmp_path, sidecar_lines="captions")[0].captions == ("a cat", "asleep")


def test_json_sidecars_come_after_text_ones(tmp_path):
    for i, name in enumerate("abc"):
        save_image(tmp_path / f"{name}.png", i)
        (tmp_path / f"{name}.json").write_text(json.dumps({"text": [f"{name} 1", f"{name} 2"]}))
    (tmp_path / "a.txt").write_text("from text")
    folder = read_folder(tmp_path)
    assert [r.captions for r in folder] == [("from text",), ("b 1", "b 2"), ("c 1", "c 2")]
    folder.check()
    (tmp_path / "b.json").write_text('{"caption": "x"}')
    (tmp_path / "c.json").write_text("[1")
    folder = read_folder(tmp_path)
    assert problem(folder, "no_column")[1].endswith("Fix: --data.caption_column=caption")
    assert problem(folder, "broken_metadata")[1].startswith("c.json: not JSON")


def test_folder_names_fill_the_caption_template(tmp_path):
    save_image(tmp_path / "train/golden_retriever/1.png")
    save_image(tmp_path / "test/tabby cat/1.png", 1)
    folder = read_folder(tmp_path, caption_template="a photo of a {label}")
    assert [record.captions[0] for record in folder] == [
        "a photo of a tabby cat",
        "a photo of a golden retriever",
    ]
    assert [record.split for record in folder] == ["test", "train"]
    refused(tmp_path, r"must have \{label\}", caption_template="a photo")


def test_a_table_may_name_files_in_sub_folders_and_stand_in_several(tmp_path):
    captioned_folder(tmp_path / "one", 2)
    save_image(tmp_path / "two/deep/x.png")
    write_jsonl(tmp_path / "two/metadata.jsonl", [{"file_name": "deep/x.png", "text": "x"}])
    folder = read_folder(tmp_path)
    assert [record.id for record in folder] == ["one/0.png", "one/1.png", "two/deep/x.png"]
    folder.check()


def test_unicode_names_match_in_either_composition(tmp_path):
    for form, name in [("NFD", "café.png"), ("NFC", "naïve 猫.png")]:
        save_image(tmp_path / unicodedata.normalize(form, name))
        other = unicodedata.normalize("NFC" if form == "NFD" else "NFD", name)
        with (tmp_path / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": other, "text": name}, ensure_ascii=False) + "\n")
    folder = read_folder(tmp_path)
    assert len(folder) == 2
    assert not folder.problems
    assert all(record.path.exists() for record in folder)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b/b.png", 1)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat\n", encoding="utf-8-sig")
    (tmp_path / "b/b.txt").write_text("a dog", encoding="utf-8-sig")
    folder = read_folder(tmp_path)
    assert [record.captions for record in folder] == [("a cat",), ("a dog",)]
    assert not folder.problems


def test_hidden_files_and_folders_are_ignored(tmp_path):
    captioned_folder(tmp_path, 1)
    save_image(tmp_path / ".thumbs/0.png")
    (tmp_path / "._0.png").write_bytes(b"resource fork")
    folder = read_folder(tmp_path)
    assert len(folder) == 1
    assert not folder.problems


# ---- splits ----


def test_splits_by_folder(tmp_path):
    for name in ("train", "val", "Test", "other"):
        captioned_folder(tmp_path / name, 2)
    folder = read_folder(tmp_path, heldout_fraction=0.5)
    assert [r.id for r in folder.split("validation")] == ["val/0.png", "val/1.png"]
    assert [r.id for r in folder.split("test")] == ["Test/0.png", "Test/1.png"]
    assert len(folder.split("train")) == 4
    assert [r.split for r in folder.heldout()] == ["validation"] * 2


def test_a_folder_that_looks_like_a_held_out_split_is_trained_on_with_a_warning(tmp_path, caplog):
    for name in ("train", "test_easy", "val2017", "tests", "detest_me"):
        captioned_folder(tmp_path / name, 1)
    folder = read_folder(tmp_path)
    assert len(folder.split("train")) == 5
    (message,) = caplog.messages
    assert "test_easy/ and val2017/ are read as training images" in message
    caplog.clear()
    read_folder(tmp_path / "train")
    assert not caplog.messages


def test_splits_by_hash_are_stable_when_the_folder_grows(tmp_path):
    captioned_folder(tmp_path, 60, width=8, height=8)
    before = {r.id: r.split for r in read_folder(tmp_path, heldout_fraction=0.3)}
    captioned_folder(tmp_path, 90, width=8, height=8)
    after = read_folder(tmp_path, heldout_fraction=0.3)
    assert {r.id: r.split for r in after if r.id in before} == before
    assert 10 <= len(after.heldout()) <= 45
    assert len(after.heldout()) + len(after.split("train")) == 90


def test_each_caption_streams_all_of_them_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "CHUNK_ROWS", 2)
    captions = [["a", "b"], ["c"], ["a"], ["d", "e"], ["f"]]
    for i, texts in enumerate(captions):
        save_image(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text("\n".join(texts))
    folder = read_folder(tmp_path, sidecar_lines="captions")
    assert list(folder.each_caption()) == list("abcadef")
    assert list(folder.select(np.array([4, 0, 2])).each_caption()) == list("faba")


def test_files_of_a_selection_are_those_that_it_reads_in_its_order(tmp_path):
    root = captioned_folder(tmp_path, 5)
    for i in range(5):
        noise_image(i).convert("L").save(root / f"{i}.mask.png")
    chosen = read_folder(root, mask="file").select(np.array([3, 0, 4]))
    kinds = ((chosen.files(), chosen.read_bytes), (chosen.mask_files(), chosen.read_mask))
    for files, read in kinds:
        for index, row in enumerate(files.to_pylist()):
            assert (root / row["path"]).read_bytes() == read(index)
            assert (row["size"], row["offset"]) == (len(read(index)), ALONE)
    assert not len(chosen[:0].files()) + len(chosen[:0].mask_files())


def test_selecting_keeps_ids_and_problems(tmp_path):
    folder = read_folder(captioned_folder(tmp_path, 5)).select(np.array([3, 1]))
    assert [record.id for record in folder] == ["3.png", "1.png"]
    assert folder[1:][0].id == "1.png"


# ---- faults: images ----


def broken_folder(tmp_path: Path, name: str, data: bytes) -> Folder:
    captioned_folder(tmp_path, 4)
    (tmp_path / name).write_bytes(data)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": "broken"}) + "\n")
    folder = read_folder(tmp_path)
    assert len(folder) == 4
    assert folder.num_found == 5
    assert folder.invalid_fraction == 0.2
    with pytest.raises(ValueError, match=name):
        folder.check(max_invalid_fraction=0.1)
    folder.check(max_invalid_fraction=0.2)
    return folder


def jpeg(path: Path, **options) -> bytes:
    noise_image(9, width=200, height=200).save(path, **options)
    data = path.read_bytes()
    path.unlink()
    return data


def test_a_truncated_image_is_skipped_and_named_by_the_quick_scan(tmp_path):
    data = jpeg(tmp_path / "bad.jpg")
    folder = broken_folder(tmp_path, "bad.jpg", data[: len(data) // 2])
    assert problem(folder, "truncated")[1].startswith("bad.jpg: ")


@pytest.mark.parametrize(
    ("data", "key"), [(b"", "empty_file"), (b"GET / HTTP/1.1\r\n", "not_an_image")]
)
def test_empty_and_foreign_files_are_skipped_and_named(tmp_path, data, key):
    assert problem(broken_folder(tmp_path, "bad.jpg", data), key)[0] == 1


def test_a_wrong_extension_is_accepted_and_noted(tmp_path):
    captioned_folder(tmp_path, 1)
    noise_image().save(tmp_path / "0.jpg", "PNG")
    noise_image().save(tmp_path / "noext", "JPEG")
    rows = [{"file_name": name, "text": name} for name in ("0.jpg", "0.png", "noext")]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    folder = read_folder(tmp_path)
    assert [record.id for record in folder] == ["0.jpg", "0.png", "noext"]
    assert problem(folder, "wrong_extension") == (2, "0.jpg: ")
    folder.check()


def test_sizes_are_taken_after_the_orientation(tmp_path):
    captioned_folder(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_image(width=40, height=20).save(tmp_path / "0.png", exif=exif)
    folder = read_folder(tmp_path)
    assert (folder[0].width, folder[0].height) == (20, 40)
    assert problem(folder, "turned") == (1, "0.png: ")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_more_than_89_megapixels_is_skipped(tmp_path):
    folder = broken_folder(tmp_path, "bad.png", png_header(10_000, 9_000))
    assert problem(folder, "too_many_pixels") == (1, "bad.png: 10000 x 9000 pixels")


def test_small_and_thin_images_are_skipped_with_their_size(tmp_path):
    captioned_folder(tmp_path, 3)
    save_image(tmp_path / "1.png", width=30, height=12)
    save_image(tmp_path / "2.png", width=200, height=20)
    folder = read_folder(tmp_path, min_size=16, max_aspect=3.0)
    assert [record.id for record in folder] == ["0.png"]
    assert problem(folder, "too_small") == (1, "1.png: 30 x 12, data.min_size=16")
    assert problem(folder, "aspect_ratio") == (1, "2.png: 200 x 20, data.max_aspect=3")


def test_animations_are_noted(tmp_path):
    captioned_folder(tmp_path, 1)
    noise_image().save(tmp_path / "0.png", save_all=True, append_images=[noise_image(1)])
    folder = read_folder(tmp_path)
    assert problem(folder, "animated") == (1, "0.png: ")
    folder.check()


def test_full_finds_damage_that_the_quick_scan_cannot(tmp_path):
    captioned_folder(tmp_path, 2)
    data = bytearray((tmp_path / "1.png").read_bytes())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    (tmp_path / "1.png").write_bytes(data)
    assert len(read_folder(tmp_path)) == 2
    folder = read_folder(tmp_path, full=True)
    assert len(folder) == 1
    assert problem(folder, "truncated")[0] == 1


@needs_permissions
def test_unreadable_files_and_folders_are_reported(tmp_path):
    captioned_folder(tmp_path, 2)
    (tmp_path / "sub").mkdir()
    (tmp_path / "1.png").chmod(0)
    (tmp_path / "sub").chmod(0)
    folder = read_folder(tmp_path)
    (tmp_path / "sub").chmod(0o755)
    assert problem(folder, "unreadable") == (1, "1.png: Permission denied")
    assert problem(folder, "unreadable_folder")[1].startswith("sub")


def test_an_open_that_is_refused_is_reported(tmp_path, monkeypatch):
    captioned_folder(tmp_path, 2)
    real = image_headers.open_entry

    def no_access(root, entry):
        if entry.path == "1.png":
            raise PermissionError(13, "Permission denied")
        return real(root, entry)

    monkeypatch.setattr(image_headers, "open_entry", no_access)
    assert problem(read_folder(tmp_path), "unreadable") == (1, "1.png: Permission denied")


def test_a_pipe_named_like_an_image_is_never_opened(tmp_path):
    captioned_folder(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    assert problem(read_folder(tmp_path), "not_a_file") == (1, "pipe.png: ")


def test_a_name_that_is_not_utf8_is_reported(tmp_path):
    captioned_folder(tmp_path, 1)
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write((tmp_path / "0.png").read_bytes())
    assert problem(read_folder(tmp_path), "name_not_utf8") == (1, "'caf\\udce9.png': ")


# ---- faults: links ----


def test_links_that_leave_the_folder_are_refused_unless_followed(tmp_path):
    outside = save_image(tmp_path / "blobs/abc.png")
    root = captioned_folder(tmp_path / "data", 1)
    (root / "x.png").symlink_to(outside)
    write_jsonl(
        root / "metadata.jsonl",
        [{"file_name": "0.png", "text": "a"}, {"file_name": "x.png", "text": "b"}],
    )
    folder = read_folder(root)
    assert problem(folder, "link_leaves") == (1, f"x.png: points to {outside}")
    assert "missing_file" not in folder.problems
    refused(root, "--data.follow_links=true")
    followed = read_folder(root, follow_links=True)
    assert [record.id for record in followed] == ["0.png", "x.png"]
    followed.check()


def test_a_prefix_of_the_name_is_not_the_folder(tmp_path):
    root = captioned_folder(tmp_path / "data", 1)
    secret = save_image(tmp_path / "data-private/s.png")
    (root / "s.png").symlink_to(secret)
    assert "link_leaves" in read_folder(root).problems


def test_links_inside_the_folder_are_followed_and_broken_ones_named(tmp_path):
    captioned_folder(tmp_path, 1)
    (tmp_path / "same.png").symlink_to("0.png")
    (tmp_path / "gone.png").symlink_to("nothing.png")
    rows = [{"file_name": name, "text": name} for name in ("0.png", "same.png")]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    folder = read_folder(tmp_path)
    assert len(folder) == 2
    assert problem(folder, "link_broken")[1].startswith("gone.png: points to ")


def test_folder_links_make_no_loop(tmp_path):
    outside = captioned_folder(tmp_path / "elsewhere", 1)
    root = captioned_folder(tmp_path / "data", 1)
    (root / "loop").symlink_to(root)
    (root / "out").symlink_to(outside)
    folder = read_folder(root)
    assert set(folder.problems) == {"link_leaves", "link_folder"}
    followed = read_folder(root, follow_links=True)
    assert [record.id for record in followed] == ["0.png", "out/0.png"]


# ---- faults: captions ----


def test_an_image_without_a_caption_is_skipped_or_gets_an_empty_one(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png", 1)
    (tmp_path / "a.txt").write_text("a")
    folder = read_folder(tmp_path)
    assert problem(folder, "no_caption") == (1, "b.png: ")
    assert folder.invalid_fraction == 0.5
    folder = read_folder(tmp_path, missing_caption="empty")
    assert [record.captions for record in folder] == [("a",), ("",)]
    assert problem(folder, "empty_caption")[0] == 1
    folder.check()


def test_empty_captions_are_counted(tmp_path):
    captioned_folder(tmp_path, 1)
    save_image(tmp_path / "b/1.png", 1)
    (tmp_path / "b/1.txt").write_text("  \n")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "text": " "}])
    folder = read_folder(tmp_path)
    assert folder.problems["empty_caption"].count == 2
    assert [record.captions for record in folder] == [("",), ("",)]


def test_text_that_is_not_utf8_is_an_error_with_the_byte(tmp_path):
    captioned_folder(tmp_path, 2)
    with (tmp_path / "metadata.jsonl").open("ab") as file:
        at = file.tell()
        file.write(b'{"file_name": "caf\xe9.png"}\n')
    save_image(tmp_path / "s/s.png")
    (tmp_path / "s/s.txt").write_bytes("one\ncafé".encode("latin-1"))
    folder = read_folder(tmp_path)
    assert folder.problems["caption_not_utf8"].examples == [
        ("metadata.jsonl", f"byte {at + 18} is 0xe9"),
        ("s/s.txt", "byte 7 is 0xe9"),
    ]
    refused(tmp_path, "byte 7 is 0xe9")


def test_a_csv_that_is_not_utf8_is_an_error_with_the_byte(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\n")
    refused(tmp_path, r"metadata.csv: byte 24 is 0xe9")


def test_control_characters_are_stripped_and_reported(tmp_path):
    captioned_folder(tmp_path, 1)
    row = {"file_name": "0.png", "text": "a\x00cat \ud800"}
    write_jsonl(tmp_path / "metadata.jsonl", [row])
    folder = read_folder(tmp_path)
    assert folder[0].captions == ("acat",)
    assert problem(folder, "control_characters") == (1, "metadata.jsonl:1: 0.png")


@pytest.mark.parametrize("value", [None, 5, ["a", None], [], {"a": 1}, True])
def test_a_caption_that_is_no_text_is_an_error_with_its_row(tmp_path, value):
    captioned_folder(tmp_path, 2)
    rows = [{"file_name": "0.png", "text": "x"}, {"file_name": "1.png", "text": value}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    assert problem(read_folder(tmp_path), "caption_type")[1].startswith("metadata.jsonl:2: ")
    refused(tmp_path, "metadata.jsonl:2")


def test_a_null_in_parquet_is_an_error_with_its_row(tmp_path):
    captioned_folder(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    table = pa.table({"file_name": ["0.png", "1.png"], "text": ["a", None]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    refused(tmp_path, 'metadata.parquet:2: "text" is null')


def test_an_image_listed_twice_is_an_error_or_has_two_captions(tmp_path):
    captioned_folder(tmp_path, 2)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "./0.png", "text": "again"}\n')
    refused(tmp_path, r"0.png: in metadata.jsonl:1, metadata.jsonl:3.*--data.duplicate_rows")
    folder = read_folder(tmp_path, duplicate_rows="captions")
    assert folder[0].captions == ("image 0", "again")
    folder.check()


def test_a_row_for_a_missing_file_is_an_error_with_a_hint(tmp_path):
    captioned_folder(tmp_path, 2)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "9.png", "text": ""}\n{"file_name": "1.PNG", "text": ""}\n')
    folder = read_folder(tmp_path)
    assert folder.problems["missing_file"].examples == [
        ("metadata.jsonl:3", "9.png"),
        ("metadata.jsonl:4", "1.PNG; there is 1.png"),
    ]


def test_an_image_without_a_row_is_counted_and_not_used(tmp_path):
    captioned_folder(tmp_path, 2)
    save_image(tmp_path / "extra.png")
    folder = read_folder(tmp_path)
    assert problem(folder, "unlisted") == (1, "extra.png: ")
    assert len(folder) == folder.num_found == 2
    folder.check()


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "/etc/passwd", "a/../../b.png", "C:\\x.png", "\\\\host\\x.png", "..\\x.png"],
)
def test_a_file_name_that_leads_out_is_refused(tmp_path, name):
    captioned_folder(tmp_path / "data", 1)
    save_image(tmp_path / "secret.png")
    with (tmp_path / "data/metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": "x"}) + "\n")
    folder = read_folder(tmp_path / "data")
    assert problem(folder, "outside")[1].startswith("metadata.jsonl:2: got ")
    refused(tmp_path / "data", "leads out of the folder")


@pytest.mark.parametrize("value", [None, 3, "", "  "])
def test_a_file_name_that_is_no_text_is_an_error(tmp_path, value):
    captioned_folder(tmp_path, 1)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": value, "text": "x"}) + "\n")
    refused(tmp_path, "metadata.jsonl:2")


def test_two_caption_tables_are_refused(tmp_path):
    captioned_folder(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    refused(tmp_path, "two caption tables.*metadata.csv, metadata.jsonl")


def test_two_caption_tables_at_two_levels_are_refused_for_the_same_image(tmp_path):
    captioned_folder(tmp_path / "sub", 1)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "sub/0.png", "text": "x"}])
    refused(tmp_path, "sub/0.png: listed in metadata.jsonl:1, sub/metadata.jsonl:1")


@pytest.mark.parametrize(
    "line",
    ['{"file_name": "0.png", "text": ', "[1, 2]", '"text"', "{'a': 1}", "[" * 9999, "1" * 9999],
)
def test_broken_json_is_an_error_with_its_line(tmp_path, line):
    captioned_folder(tmp_path, 1)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("\n" + line + "\n")
    refused(tmp_path, "metadata.jsonl:3")


@pytest.mark.parametrize(
    ("text", "line"), [("file_name,text\n0.png,a,b\n", 2), ('file_name,text\n0.png,"a\n', 2)]
)
def test_a_broken_csv_is_an_error_with_its_line(tmp_path, text, line):
    save_image(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text(text)
    refused(tmp_path, f"metadata.csv:{line}")


def test_a_broken_parquet_file_is_an_error(tmp_path):
    save_image(tmp_path / "0.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and no more")
    refused(tmp_path, "broken caption table.*metadata.parquet")


def test_metadata_json_is_reported_as_the_wrong_name(tmp_path):
    captioned_folder(tmp_path, 2)
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata.json")
    refused(tmp_path, "metadata.json is not read.*metadata.jsonl: one JSON object a line")


def test_metadata_json_next_to_good_captions_is_no_fault(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "metadata.json").write_text("{}")
    read_folder(tmp_path).check()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_missing_caption_column_names_the_file_the_columns_and_the_fix(tmp_path, suffix):
    save_image(tmp_path / "a.png")
    row = {"file_name": "a.png", "number": "1", "captions": "x"}
    path = tmp_path / f"metadata.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, [row])
    elif suffix == "csv":
        path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    columns = 'no column "caption"; the columns are: file_name, number, captions. '
    refused(tmp_path, columns + "Fix: --data.caption_column=captions", caption_column="caption")
    refused(tmp_path, "name the column of file names", file_column="image")


def test_two_sidecars_that_differ_are_an_error(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.caption").write_text("one")
    read_folder(tmp_path).check()
    (tmp_path / "a.caption").write_text("two")
    refused(tmp_path, "two caption files that differ")


def test_a_sidecar_next_to_a_row_and_a_stray_one_are_noted(tmp_path):
    captioned_folder(tmp_path, 1)
    (tmp_path / "0.txt").write_text("other")
    (tmp_path / "stray.txt").write_text("?")
    folder = read_folder(tmp_path)
    assert folder[0].captions == ("image 0",)
    assert problem(folder, "two_sources") == (1, "0.png: ")
    assert problem(folder, "stray_caption") == (1, "stray.txt: ")
    folder.check()


def test_a_huge_sidecar_is_not_read(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x" * 1_000_001)
    refused(tmp_path, "a.txt: a caption file of more than 1,000,000 bytes")


# ---- the folder as a whole ----


def test_a_folder_without_captions_names_the_likely_files(tmp_path):
    save_image(tmp_path / "a.png")
    refused(tmp_path, "no image has a caption.*metadata.jsonl.*txt.*caption_template")
    (tmp_path / "captions.csv").write_text("file_name,text\n")
    refused(tmp_path, "captions.csv: not read, a caption table must be named one of metadata.jsonl")


def test_an_empty_folder_a_file_and_nothing_are_refused(tmp_path):
    refused(tmp_path, "no image found")
    with pytest.raises(FileNotFoundError, match=r"does not exist; check --data.root"):
        read_folder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        read_folder(tmp_path / "file")


@pytest.mark.parametrize(
    "settings", [{"heldout_fraction": 1.0}, {"heldout_fraction": -0.1}, {"max_aspect": 0.5}]
)
def test_settings_out_of_range_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=f"data.{next(iter(settings))} must be"):
        read_folder(tmp_path, **settings)


def test_nothing_in_the_folder_is_ever_changed(tmp_path):
    root = captioned_folder(tmp_path / "data", 3)
    (root / "1.png").write_bytes(b"broken")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.iterdir()}
    read_folder(root, cache_dir=tmp_path / "cache", full=True)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.iterdir()} == before


def test_the_summary_names_each_reason_with_files_and_fixes(tmp_path):
    captioned_folder(tmp_path, 8)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be used") as error:
        read_folder(tmp_path).check(max_invalid_fraction=0.5)
    text = str(error.value)
    assert "5 of 8 images (62.5%) are skipped, more than data.max_invalid_fraction=0.5" in text
    assert "empty file (0 bytes) (5): 0.png: 0 bytes; 1.png" in text
    assert "and 2 more" in text
    assert " inspect " in text


def test_file_names_are_captions_where_there_is_none(tmp_path):
    for name in ("a_red heart (2).png", "deep/apollo_11.png", "own.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise_image().save(tmp_path / name)
    (tmp_path / "own.txt").write_text("a caption of its own")
    folder = read_folder(tmp_path, missing_caption="file_name")
    folder.check()
    captions = [record.captions for record in folder]
    assert captions == [("a red heart",), ("apollo 11",), ("a caption of its own",)]
