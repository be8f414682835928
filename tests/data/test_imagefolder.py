"""Folders that our tools write open in Hugging Face's `datasets`, where it is installed."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from fakes_data import captioned_folder
from fakes_pipeline import tiny_components, tiny_pipeline

from latentdiff.config.options import SampleOptions
from latentdiff.data.folder.folder import read_folder
from latentdiff.data.merge_folders import merge_folders
from latentdiff.data.shapes import write_shapes
from latentdiff.models.components import Components
from latentdiff.sampling.resume_folder import write_image_table
from latentdiff.sampling.sample import sample
from latentdiff.training.text_to_image.preview import write_sheet

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


def test_sampled_images_open_with_their_prompts_and_are_trained_on(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    options = SampleOptions(
        out=str(tmp_path / "images"), num_inference_steps=1, num_images=2, trace=True
    )
    list(sample(str(tmp_path / "model"), ["a cat", "a red heart"], options, log=print))
    fewer = SampleOptions(out=str(tmp_path / "images"), num_inference_steps=1, num_images=2)
    list(sample(str(tmp_path / "model"), ["a cat"], fewer, log=print))  # the others stay listed
    rows = opened(tmp_path / "images", tmp_path / "cache")["train"]
    assert list(rows["text"]) == ["a cat", "a cat", "a red heart", "a red heart"]
    assert list(rows["seed"]) == [0, 1, 2, 3]
    assert rows[0]["image"].size == (32, 32)
    folder = read_folder(tmp_path / "images")
    assert folder.captions.flatten().to_pylist() == list(rows["text"])


def test_sheets_of_a_run_open_with_their_prompts(tmp_path):
    components = Components(**tiny_components())
    options = {"accelerator": Accelerator(cpu=True), "seed": 0, "num_steps": 1}
    for step in (2, 4):
        path = tmp_path / "samples" / f"step-{step:09d}.png"
        write_sheet(components, ["a cat", "a sea"], path, guidance_scale=1.0, **options)
    rows = opened(tmp_path / "samples", tmp_path / "cache")["train"]
    assert list(rows["text"]) == ["a cat | a sea"] * 2


def test_a_table_that_is_not_ours_is_left_as_it_is(tmp_path, caplog):
    for text in ("not json", '{"name": "a.png"}', "[]"):
        (tmp_path / "metadata.jsonl").write_text(text)
        write_image_table(tmp_path, [{"file_name": "a.png", "text": "a cat"}])
        assert (tmp_path / "metadata.jsonl").read_text() == text
    assert caplog.text.count("left as it is") == 3
