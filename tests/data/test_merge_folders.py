"""Several captioned folders as one: nothing lost, nothing mixed, nothing half written."""

import json
import tarfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes_data import save_image
from PIL import Image

from latentdiff.data.folder.folder import read_folder
from latentdiff.data.merge_folders import merge_folders


def make_folder(root: Path, rows: dict[str, list[dict[str, object]]]) -> Path:
    for split, table in rows.items():
        for i, row in enumerate(table):
            path = root / split / str(row["file_name"])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, len(root.name), len(split))).save(path)
        lines = [json.dumps(row, ensure_ascii=False) for row in table]
        (root / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    emoji = {
        "train": [{"file_name": "a.png", "text": "a cat", "group": "animals"}],
        "test": [{"file_name": "b.png", "text": "un café"}],
    }
    flowers = {
        "train": [
            {"file_name": "a.png", "text": "a daisy", "captions": ["a daisy", "a white daisy"]},
            {"file_name": "deep/c.png", "text": "a tulip"},
        ],
    }
    return [make_folder(tmp_path / "emoji", emoji), make_folder(tmp_path / "flowers", flowers)]


def test_every_image_keeps_its_split_its_captions_and_its_columns(
    tmp_path: Path, folders: list[Path]
) -> None:
    counts = merge_folders(tmp_path / "out", folders)
    assert counts == {"emoji": {"train": 1, "test": 1}, "flowers": {"train": 2}}
    folder = read_folder(tmp_path / "out", caption_column="captions")
    folder.check()
    assert {(r.id, r.split, r.captions) for r in folder} == {
        ("train/emoji/a.png", "train", ("a cat",)),
        ("train/flowers/a.png", "train", ("a daisy", "a white daisy")),
        ("train/flowers/deep/c.png", "train", ("a tulip",)),
        ("test/emoji/b.png", "test", ("un café",)),
    }
    assert {r.captions for r in read_folder(tmp_path / "out").split("test")} == {("un café",)}
    table = (tmp_path / "out" / "train" / "metadata.jsonl").read_text(encoding="utf-8")
    assert json.loads(table.splitlines()[0])["group"] == "animals"
    for root in folders:
        for path in root.rglob("*.png"):
            split = path.relative_to(root).parts[0]
            inside = path.relative_to(root / split)
            copy = tmp_path / "out" / split / root.name / inside
            assert copy.read_bytes() == path.read_bytes()


def test_what_cannot_be_combined_is_named_and_leaves_nothing(
    tmp_path: Path, folders: list[Path]
) -> None:
    out = tmp_path / "out"
    emoji = folders[0]
    with pytest.raises(ValueError, match="different names, got emoji, emoji"):
        merge_folders(out, [emoji, emoji])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty cannot be used:\n  no image found"):
        merge_folders(out, [emoji, tmp_path / "empty"])
    table = emoji / "train" / "metadata.jsonl"
    for row, message in (
        ({"file_name": "../b.png", "text": "x"}, "names no image below its folder"),
        ({"file_name": "a.png"}, "has no caption"),
        ({"file_name": "a.png", "text": 3}, "has no caption"),
    ):
        table.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=message):
            merge_folders(out, folders)
    table.write_text('{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        merge_folders(out, folders)
    table.write_text('{"file_name": "a.png", "text": "x"}\n' * 2)
    with pytest.raises(ValueError, match=r"names a\.png twice"):
        merge_folders(out, folders)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "empty", "flowers"]
    out.mkdir()
    with pytest.raises(FileExistsError, match="expected the name of a new folder"):
        merge_folders(out, folders)


def test_every_kind_of_captioned_folder_is_merged(tmp_path: Path) -> None:
    sidecars, shards, hub = tmp_path / "sidecars", tmp_path / "shards", tmp_path / "hub"
    for k, name in enumerate(("train/a.png", "train/cats/b.png", "test/c.png", "d.png")):
        save_image(sidecars / name, k).with_suffix(".txt").write_text(f"caption {k}")
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as tar:
        tar.add(sidecars / "train" / "a.png", "a.png")
        tar.add(sidecars / "train" / "a.txt", "a.txt")
    image = {"bytes": (sidecars / "d.png").read_bytes(), "path": None}
    (hub / "data").mkdir(parents=True)
    pq.write_table(pa.table({"image": [image], "text": ["a row"]}), hub / "data" / "test-0.parquet")
    table = make_folder(
        tmp_path / "table", {"train": [{"file_name": "é.png", "text": "x", "n": 1}]}
    )
    composed = table / "train" / "é.png"
    composed.rename(composed.with_name(unicodedata.normalize("NFD", composed.name)))
    counts = merge_folders(tmp_path / "out", [sidecars, shards, hub, table])
    assert counts == {
        "sidecars": {"test": 1, "train": 3},
        "shards": {"train": 1},
        "hub": {"test": 1},
        "table": {"train": 1},
    }
    folder = read_folder(tmp_path / "out", caption_column="captions")
    folder.check()
    assert {unicodedata.normalize("NFC", r.id): r.captions for r in folder} == {
        "test/hub/data/test-0.parquet/00000000.png": ("a row",),
        "test/sidecars/c.png": ("caption 2",),
        "train/shards/0.tar/a.png": ("caption 0",),
        "train/sidecars/a.png": ("caption 0",),
        "train/sidecars/cats/b.png": ("caption 1",),
        "train/sidecars/d.png": ("caption 3",),
        "train/table/é.png": ("x",),
    }
    assert folder.read_bytes(0) == image["bytes"]


def test_a_split_with_sidecars_next_to_one_with_a_table_is_not_lost(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", {"train": [{"file_name": "a.png", "text": "x"}]})
    save_image(root / "test" / "b.png").with_suffix(".txt").write_text("y")
    assert merge_folders(tmp_path / "out", [root]) == {"a": {"test": 1, "train": 1}}


def test_a_folder_of_images_without_captions_is_refused(tmp_path: Path) -> None:
    for k in range(3):
        save_image(tmp_path / "a" / f"{k}.png", k)
    (tmp_path / "a" / "0.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"a cannot be used(.|\n)*image without a caption \(2\)"):
        merge_folders(tmp_path / "out", [tmp_path / "a"])
    assert not (tmp_path / "out").exists()
