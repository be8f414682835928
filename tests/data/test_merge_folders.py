"""Several captioned folders as one: nothing lost, nothing mixed, nothing half written."""

import json
from pathlib import Path

import pytest
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
    with pytest.raises(FileNotFoundError, match=r"empty has no train/metadata\.jsonl"):
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
