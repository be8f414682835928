"""Images that other programs leave next to photographs, and names in both Unicode forms."""

import io
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from fakes_data import captioned_folder, noise_image, save_image, write_jsonl
from fakes_icc import DISPLAY_P3, rgb_profile
from PIL import Image

from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.inspection.near_duplicates import find_near_duplicates
from latentdiff.data.inspection.statistics import subfolder_counts
from latentdiff.data.inspection.text_report import subfolders_text
from latentdiff.image_io import load_image

BY_PRODUCTS = (
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "deep/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg",
    "SYNOPHOTO_THUMB_S.jpg",
    "Thumbs/0.png",
    "deep/.thumbnails/0.png",  # hidden, as any name that starts with a dot
    "thumbnails/0.jpg",
    "samples/step_100.png",
    "__MACOSX/0.png",
    "#recycle/gone.png",
    "lost+found/0.png",
    "0-condlabel.png",
    "0_mask.png",
    "masks/1.png",
    "gone-masklabel.png",
    "gone.mask.png",
    "run/eval/sheet.png",
)
PHOTOGRAPHS = ("0.png", "1.png", "deep/2.png", "snow_mask.png", "carnival/masks/a.png")


def subject_folder(root: Path) -> Path:
    """Photographs without captions, as for DreamBooth, among by-products."""
    for seed, name in enumerate((*PHOTOGRAPHS, *BY_PRODUCTS, "0-masklabel.png", "1.mask.png")):
        save_image(root / name, seed)
    (root / "run" / "class_images").mkdir(parents=True)
    write_jsonl(root / "run/class_images/metadata.jsonl", [{"file_name": "gone.png", "text": "x"}])
    for name in ("run/config.yaml", "run/metrics.jsonl"):
        (root / name).write_text("")
    return root


def by_reason(folder: Folder) -> dict[str, list[str]]:
    return {key: sorted(n for n, _ in group.examples) for key, group in folder.problems.items()}


def ids(folder: Folder) -> list[str]:
    return [record.id for record in folder]


@pytest.mark.parametrize("missing_caption", ["empty", "skip"])
def test_by_products_are_named_and_not_trained_on(tmp_path: Path, missing_caption: str) -> None:
    root = subject_folder(tmp_path / "data")
    if missing_caption == "skip":
        for name in PHOTOGRAPHS:
            (root / name).with_suffix(".txt").write_text("a photograph")
    folder = read_folder(root, missing_caption=missing_caption)
    folder.check()
    assert ids(folder) == sorted(PHOTOGRAPHS)
    found = by_reason(folder)
    assert found["unused_mask"] == ["0-masklabel.png", "1.mask.png"]
    assert found["stray_mask"] == ["gone-masklabel.png", "gone.mask.png"]
    assert found["unused_condition"] == ["0-condlabel.png"]
    others = {"deep/.thumbnails/0.png", *found["stray_mask"], *found["unused_condition"]}
    assert set(found["by_product"]) == set(BY_PRODUCTS) - others
    assert folder.num_found == len(PHOTOGRAPHS)


def test_a_caption_of_its_own_makes_a_by_product_an_image(tmp_path: Path) -> None:
    root = subject_folder(tmp_path / "data")
    listed = ["0.png", "0-masklabel.png", "1.mask.png", "samples/step_100.png"]
    write_jsonl(root / "metadata.jsonl", [{"file_name": n, "text": "x"} for n in listed])
    (root / "Thumbs" / "0.txt").write_text("a thumb")
    folder = read_folder(root)
    assert ids(folder) == sorted([*listed, "Thumbs/0.png"])


def test_a_folder_of_by_products_alone_says_so(tmp_path: Path) -> None:
    save_image(tmp_path / "samples" / "a.png")
    with pytest.raises(ValueError, match=r"no image found.*samples/a\.png.*metadata"):
        read_folder(tmp_path, missing_caption="empty").check()


def test_masks_of_another_program_are_masks_where_they_are_used(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "data", 3)
    noise_image(0).convert("L").save(root / "0-masklabel.png")
    noise_image(1).convert("L").save(root / "1.mask.png")
    noise_image(2).convert("L").save(root / "1-masklabel.png")
    folder = read_folder(root, mask="file")
    assert ids(folder) == ["0.png", "1.png"]
    assert folder.read_mask(0) == (root / "0-masklabel.png").read_bytes()
    assert folder.read_mask(1) == (root / "1.mask.png").read_bytes()
    assert by_reason(folder) == {"no_mask": ["2.png"], "second_mask": ["1-masklabel.png"]}


def test_subfolders_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "x/c.png", "x/y/d.png"):
        save_image(tmp_path / name)
    folder = read_folder(tmp_path, missing_caption="empty")
    counts = subfolder_counts(folder)
    assert counts == {".": 2, "x": 1, "x/y": 1}
    assert subfolders_text(counts) == "2 in ., 1 in x, 1 in x/y"
    assert subfolders_text(counts, max_names=1) == "2 in ., 2 in 2 other folders"
    assert subfolder_counts(folder[:0]) == {}


# ---- Unicode forms ----


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize(("stored", "written"), [(nfd, nfc), (nfc, nfd)])
def test_names_match_in_either_unicode_form(tmp_path: Path, stored, written) -> None:
    root = tmp_path / "data"
    for name in ("café/é 1", "café/é 2", "café/é 3", "한국어"):
        save_image(root / stored(f"{name}.png"), len(name))
    (root / written("café")).mkdir(exist_ok=True)
    (root / written("café/é 1.txt")).write_text("one")
    (root / written("café/é 2.json")).write_text('{"text": "two"}')
    (root / written("한국어.caption")).write_text("three")
    noise_image(0).convert("L").save(root / written("café/é 1.mask.png"))
    (root / stored("café") / "metadata.jsonl").write_text(
        '{"file_name": "' + written("é 3.png") + '", "text": "four"}\n', encoding="utf-8"
    )
    folder = read_folder(root)
    captions = {nfc(record.id): record.captions for record in folder}
    assert captions == {
        "café/é 1.png": ("one",),
        "café/é 2.png": ("two",),
        "café/é 3.png": ("four",),
        "한국어.png": ("three",),
    }
    assert ids(folder) == sorted(stored(name) for name in captions)  # as they are on disk
    assert list(folder.problems) == ["unused_mask"]
    masked = read_folder(root, mask="file")
    assert ids(masked) == [stored("café/é 1.png")]
    assert masked.read_mask(0) == (root / written("café/é 1.mask.png")).read_bytes()


def test_names_that_look_the_same_keep_what_is_exactly_theirs(tmp_path: Path) -> None:
    for form, text in ((nfc, "composed"), (nfd, "decomposed")):
        save_image(tmp_path / form("é.png"), len(text))
        (tmp_path / form("é.txt")).write_text(text)
    folder = read_folder(tmp_path)
    assert {r.id: r.captions[0] for r in folder} == {
        nfc("é.png"): "composed",
        nfd("é.png"): "decomposed",
    }
    assert folder.problems["same_name"].count == 1
    assert not find_near_duplicates(folder)


def test_the_data_folder_itself_is_found_in_either_form(tmp_path: Path) -> None:
    captioned_folder(tmp_path / nfd("é") / nfd("ü"), 2)
    folder = read_folder(tmp_path / nfc("é") / nfc("ü"))
    assert len(folder) == 2
    assert folder.read_bytes(0)
    assert np.array_equal(folder.widths, [40, 40])


def test_forty_photographs_among_everything_else_are_the_forty_right_images(tmp_path: Path) -> None:
    root, right = tmp_path / "data", {}
    stored = Image.new("RGB", (64, 48), (200, 60, 60))
    for i in range(40):
        has_profile = i % 2 == 0
        name = nfd(f"café {i}.png") if i % 3 else f"{i}.png"
        (root / "masks").mkdir(parents=True, exist_ok=True)
        profile = {"icc_profile": rgb_profile(*DISPLAY_P3)} if has_profile else {}
        stored.save(root / name, **profile)
        right[name] = (217, 42, 52) if has_profile else (200, 60, 60)
        (root / nfc(name)).with_suffix(".txt").write_text(f"a clock (12:{i}) [on] a wall")
        stem = (root / name).with_suffix("")
        for extra in (f"{stem}-masklabel.png", f"{stem}_mask.png", root / "masks" / name):
            stored.convert("L").save(extra)
        save_image(root / "@eaDir" / name / "SYNOPHOTO_THUMB_M.jpg")
        save_image(root / "samples" / f"{i}.png")
    folder = read_folder(root)
    folder.check()
    assert ids(folder) == sorted(right)
    for index, record in enumerate(folder):
        number = record.id.removesuffix(".png").split()[-1]
        assert record.captions == (f"a clock (12:{number}) [on] a wall",)
        values = np.asarray(load_image(io.BytesIO(folder.read_bytes(index))), int)
        assert abs(values - right[record.id]).max() <= 2


# ---- kinds of files ----


def save_as(path: Path, seed: int, image_format: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = noise_image(seed)
    if image_format == "PBM":
        image, image_format = image.convert("1"), "PPM"
    options = {"save_all": True, "append_images": [image]} if image_format == "MPO" else {}
    image.save(path, image_format, **options)


READ_KINDS = {
    ".mpo": "MPO",
    ".apng": "PNG",
    ".dib": "BMP",
    ".pnm": "PPM",
    ".pbm": "PBM",
    ".jpg_large": "JPEG",
}
UNREAD_KINDS = (".jxl", ".tga", ".psd", ".cr2")


@pytest.mark.parametrize("in_shard", [False, True])
def test_every_kind_that_can_be_read_is_listed_and_loaded(tmp_path: Path, in_shard: bool) -> None:
    source = tmp_path / ("members" if in_shard else "data")
    for seed, (extension, image_format) in enumerate(READ_KINDS.items()):
        save_as(source / f"{seed}{extension}", seed, image_format)
        (source / f"{seed}.txt").write_text(f"image {seed}")
    if in_shard:
        (tmp_path / "data").mkdir()
        with tarfile.open(tmp_path / "data" / "0.tar", "w") as tar:
            for path in sorted(source.iterdir()):
                tar.add(path, path.name)
    folder = read_folder(tmp_path / "data", full=True)
    folder.check()
    assert [record.captions[0] for record in folder] == [f"image {i}" for i in range(6)]
    assert [Path(name).suffix for name in ids(folder)] == list(READ_KINDS)
    for index, image_format in enumerate(READ_KINDS.values()):
        stored = load_image(io.BytesIO(folder.read_bytes(index)))
        assert stored.size == noise_image(index).size
        if image_format in ("PNG", "BMP", "PPM"):
            np.testing.assert_array_equal(stored, noise_image(index))
    assert list(folder.problems) == ["wrong_extension"]  # the JPEG named .jpg_large


@pytest.mark.parametrize("missing_caption", ["empty", "skip"])
def test_kinds_that_are_not_read_are_named_and_spoil_nothing(
    tmp_path: Path, missing_caption: str
) -> None:
    root = captioned_folder(tmp_path / "data", 3)
    unread = [f"alone{extension}" for extension in UNREAD_KINDS]
    copies = ["0.cr2", "1.PSD"]
    for name in [*unread, *copies]:
        (root / name).write_bytes(b"some other format")
    (root / "1.txt").write_text("of the image alone")
    folder = read_folder(root, missing_caption=missing_caption)
    folder.check(max_invalid_fraction=0)
    assert ids(folder) == ["0.png", "1.png", "2.png"]
    found = by_reason(folder)
    assert found.pop("unread_image") == sorted([*unread, *copies])
    assert list(found) in ([], ["two_sources"])
    assert folder.invalid_fraction == 0


def test_a_kind_that_is_not_read_counts_where_it_has_a_caption(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "data", 3)
    for name in ("a.psd", "b.jpg_large"):
        (root / name).write_bytes(b"some other format")
        (root / name).with_suffix(".txt").write_text("wanted")
    folder = read_folder(root)
    assert by_reason(folder) == {"unsupported": ["a.psd", "b.jpg_large"]}
    assert folder.invalid_fraction == 0.4


def test_files_of_other_kinds_are_counted_by_kind(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "data", 3)
    side_files = ("README", "LICENSE", "notes.md", "x.npz", "Thumbs.db", ".DS_Store", "0.xmp")
    for name in (*side_files, "a.mov", "sub/b.MOV", "c.jpg~", "noname", "@eaDir/0.png@Syno"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    folder = read_folder(root)
    folder.check()
    assert dict(folder.problems["other_files"].examples) == {
        ".jpg~": "1 file c.jpg~",
        ".mov": "2 files, such as a.mov",
        "no extension": "1 file noname",
    }
    assert list(folder.problems) == ["other_files"]
    assert (
        "kind of file that is not read (3): .jpg~: 1 file" in folder.problems["other_files"].line()
    )


def test_a_folder_of_nothing_that_can_be_read_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.jxl").write_bytes(b"x")
    (tmp_path / "b.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no image found.*a\.jxl.*convert it.*\.mp4: 1 file"):
        read_folder(tmp_path).check()
