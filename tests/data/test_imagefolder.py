"""Folders that our tools write open in Hugging Face's `datasets`, where it is installed."""

from pathlib import Path

import pytest
from fakes_data import captioned_folder

from latentdiff.data.merge_folders import merge_folders
from latentdiff.data.shapes import write_shapes

datasets = pytest.importorskip("datasets", reason="pip install datasets to run this")


def opened(root: Path, cache: Path):
    return datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(cache))


def test_shapes_and_merged_folders_open(tmp_path):
    shapes = write_shapes(tmp_path / "shapes", num_train=6, num_test=2, seed=0)
    found = opened(shapes, tmp_path / "cache")
    assert {name: len(split) for name, split in found.items()} == {"train": 6, "test": 2}
    assert found["train"][0]["text"]
    captioned_folder(tmp_path / "other", 3)
    merge_folders(tmp_path / "merged", [shapes, tmp_path / "other"])
    merged = opened(tmp_path / "merged", tmp_path / "cache")
    assert len(merged["train"]) == 9
    assert {"image", "text", "captions"} <= set(merged["train"].column_names)
