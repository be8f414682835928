"""Conditions and inpainting masks: how files are found, what can be wrong with them, and that they
are read next to their images."""

import json
from pathlib import Path

import pytest
from fakes_data import captioned_folder, noise_image, save_image, write_jsonl
from PIL import Image

from latentdiff.data.folder.folder import Folder, join_folders, read_folder
from latentdiff.data.inspection.html_report import report_as_html
from latentdiff.data.inspection.inspect import inspect_folder
from latentdiff.data.inspection.text_report import report_as_text


def by_reason(folder: Folder) -> dict[str, list[str]]:
    return {key: [name for name, _ in group.examples] for key, group in folder.problems.items()}


def ids(folder: Folder) -> list[str]:
    return [record.id for record in folder]


def listed_pairs(root: Path, num: int = 4) -> Path:
    """Images whose table names a condition in a folder of its own."""
    rows = []
    for i in range(num):
        save_image(root / f"images/{i}.png", i)
        save_image(root / f"edges/{i}.png", 10 + i)
        rows.append({"file_name": f"images/{i}.png", "text": "x", "condition": f"edges/{i}.png"})
    write_jsonl(root / "metadata.jsonl", rows)
    return root


def test_a_table_names_conditions_which_are_no_images(tmp_path: Path) -> None:
    root = listed_pairs(tmp_path / "data")
    folder = read_folder(root, condition="size", cache_dir=tmp_path / "cache")
    folder.check()
    assert ids(folder) == [f"images/{i}.png" for i in range(4)]
    assert not folder.problems
    assert folder.num_found == 4
    again = read_folder(root, condition="size", cache_dir=tmp_path / "cache")  # mapped from disk
    for one in (folder, again):
        conditions, starts = one.companions("condition")
        assert ids(conditions) == [f"edges/{i}.png" for i in range(4)]
        assert starts.tolist() == [0, 1, 2, 3, 4]
        assert conditions.read_bytes(2) == (root / "edges/2.png").read_bytes()


def test_several_conditions_of_an_image_keep_their_order(tmp_path: Path) -> None:
    root = listed_pairs(tmp_path / "data")
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    rows[1]["condition"] = ["edges/3.png", "edges/1.png"]
    del rows[2]["condition"]
    noise_image(7).save(root / "images/2.condition.png")
    write_jsonl(root / "metadata.jsonl", rows)
    folder = read_folder(root, condition="size")
    conditions, starts = folder.select([3, 1, 2]).companions("condition")
    assert ids(conditions) == [
        *("edges/3.png", "edges/3.png", "edges/1.png", "images/2.condition.png")
    ]
    assert starts.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("column", ["condition", "conditioning_image"])
def test_a_table_may_be_csv_and_its_column_another(tmp_path: Path, column: str) -> None:
    root = tmp_path / "data"
    for name in ("a.png", "b.png", "c-1.png"):
        save_image(root / name)
    (root / "metadata.csv").write_text(f"file_name,text,{column}\na.png,x,c-1.png\nb.png,y,\n")
    folder = read_folder(root, condition="size", condition_column=column)
    assert ids(folder) == ["a.png"]
    assert by_reason(folder) == {"no_condition": ["b.png"]}


def test_bad_conditions_are_named_and_their_images_skipped(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "data", 6)
    for i in (0, 2, 3, 4):
        noise_image(i).save(root / f"{i}.condition.png")
    noise_image(0).save(root / "0-condlabel.png")
    (root / "2.condition.png").write_bytes((root / "2.condition.png").read_bytes()[:60])
    noise_image(3, width=44).save(root / "3.condition.png")
    noise_image(4, width=20, height=16).save(root / "4.condition.png")
    noise_image(0).save(root / "gone.condition.png")
    folder = read_folder(root, condition="size")
    assert ids(folder) == ["0.png"]
    assert by_reason(folder) == {
        "no_condition": ["1.png", "5.png"],
        "broken_condition": ["2.condition.png"],
        "condition_size": ["3.condition.png", "4.condition.png"],
        "second_condition": ["0-condlabel.png"],
        "stray_condition": ["gone.condition.png"],
    }
    assert "44 x 32, its image 40 x 32" in folder.problems["condition_size"].line()
    with pytest.raises(ValueError, match=r"image without a condition \(2\).*NAME\.condition\.png"):
        folder.check()
    scaled = read_folder(root, condition="aspect")
    assert ids(scaled) == ["0.png", "4.png"]
    assert by_reason(scaled)["condition_aspect"] == ["3.condition.png"]


@pytest.mark.parametrize(
    ("size", "fits"), [((64, 43), True), ((171, 114), True), ((64, 44), False)]
)
def test_a_scaled_condition_may_be_rounded_to_whole_pixels(
    tmp_path: Path, size: tuple[int, int], fits: bool
) -> None:
    root = captioned_folder(tmp_path / "data", 1, width=512, height=341)
    noise_image(0, width=size[0], height=size[1]).save(root / "0.condition.png")
    assert len(read_folder(root, condition="aspect")) == fits


def test_a_row_that_names_no_file_is_an_error(tmp_path: Path) -> None:
    root = listed_pairs(tmp_path / "data")
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    for row, name in zip(rows, ["gone.png", "../out.png", 3, "edges\\0.png"], strict=True):
        row["condition"] = name
    write_jsonl(root / "metadata.jsonl", rows)
    found = by_reason(read_folder(root, condition="size"))
    assert found["missing_file"] == ["metadata.jsonl:1"]
    assert found["outside"] == ["metadata.jsonl:2"]
    assert found["file_name_type"] == ["metadata.jsonl:3"]
    assert found["windows_path"] == ["metadata.jsonl:4"]


def test_both_kinds_of_masks_may_stand_next_to_an_image(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "data", 3)
    for i in range(3):
        noise_image(i).convert("L").save(root / f"{i}.mask.png")
        noise_image(9 + i).convert("L").save(root / f"{i}.inpaint_mask.png")
    (root / "1.mask.png").unlink()
    folder = read_folder(root, mask="file", inpaint_mask="file")
    assert ids(folder) == ["0.png", "2.png"]
    masks, _ = folder.companions("inpaint_mask")
    assert ids(masks) == ["0.inpaint_mask.png", "2.inpaint_mask.png"]
    assert folder.read_mask(1) == (root / "2.mask.png").read_bytes()
    unused = by_reason(read_folder(root))
    assert unused["unused_inpaint_mask"] == [f"{i}.inpaint_mask.png" for i in range(3)]


def test_conditions_of_several_sources_are_found_below_the_folder_above_them(
    tmp_path: Path,
) -> None:
    folders = [
        read_folder(listed_pairs(tmp_path / name, 2), condition="size", cache_dir=tmp_path / "c")
        for name in ("one", "two")
    ]
    joined = join_folders(folders, repeats=[1, 1], cache_dir=tmp_path / "c")
    conditions, _ = joined.companions("condition")
    expected = [f"{name}/edges/{i}.png" for name in ("one", "two") for i in range(2)]
    assert ids(conditions) == expected
    assert conditions.read_bytes(3) == (tmp_path / "two/edges/1.png").read_bytes()


def test_a_report_names_conditions_that_teach_nothing_and_shows_pairs(tmp_path: Path) -> None:
    root = listed_pairs(tmp_path / "data")
    Image.new("RGB", (40, 32)).save(root / "edges/1.png")
    (root / "edges/2.png").write_bytes((root / "images/2.png").read_bytes())
    folder = read_folder(root, condition="size")
    report = inspect_folder(folder, resolution=32)
    assert report.is_usable
    assert report.problems["black_condition"]["examples"][0]["where"] == "edges/1.png"
    assert report.problems["equal_condition"]["examples"][0]["where"] == "edges/2.png"
    assert [(one.name, one.num) for one in report.pairs] == [("condition", 4)]
    assert "CONDITIONS\n  4 conditions" in report_as_text(report)
    html = report_as_html(report, folder)
    assert all(f"edges/{i}.png" in html for i in range(4))
    low_res = inspect_folder(folder, resolution=32, conditions_may_equal=True)
    assert "equal_condition" not in low_res.problems
    assert inspect_folder(read_folder(root), resolution=32, quick=True).pairs == []
