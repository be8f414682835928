"""latentdiff explain: the training images behind an image are ranked, on a page and as JSON."""

import json
from pathlib import Path

import pytest
from fakes_training import make_config, make_world
from PIL import Image

from latentdiff.cli.main import main
from latentdiff.data.folder.folder import read_folder
from latentdiff.pipeline.png_metadata import attach_settings
from latentdiff.training.text_to_image.train_t2i import train

PLANTED = 3  # index of the training image that is explained
QUICK = ("--draws", "4", "--projection_size", "2048")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, run/ with two checkpoints, and query.png, which is a training image."""
    world = make_world(tmp_path_factory.mktemp("world"))
    settings = {"train__checkpoint_every_steps": 4, "preview__num_nearest": 0}
    assert train(make_config(world, world / "run", **settings)) == 0
    folder = read_folder(world / "data").split("train")
    record = folder[PLANTED]
    image = Image.open(record.path)
    attach_settings(image, {"call": {"prompt": record.captions[0], "seed": 7}})
    image.save(world / "query.png", **image.encoderinfo)
    return world


@pytest.mark.parametrize("method", ["trak", "d_trak", "tracin", "features"])
def test_an_image_that_is_a_training_image_is_explained_by_it_first(
    method: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(world / "run"), str(world / "query.png"), "--out", str(tmp_path)]
    assert main(["explain", *given, "--method", method, *QUICK]) == 0
    name = read_folder(world / "data").split("train")[PLANTED].id
    assert f"1. {name}  " in capsys.readouterr().out
    found = json.loads((tmp_path / "explain.json").read_text())
    assert [one["rank"] for one in found["training_images"]] == [*range(1, 11)]
    first = found["training_images"][0]
    assert (first["id"], first["feature_rank"]) == (name, 1)
    assert found["made_by"]["seed"] == 7
    page = (tmp_path / "explain.html").read_text()
    assert page.count("<img") == 11
    assert found["prompt"] in page


def test_an_image_without_settings_needs_its_prompt(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 32), "red").save(tmp_path / "bare.png")
    given = [str(world / "run"), str(tmp_path / "bare.png"), *QUICK]
    assert main(["explain", *given]) == 2
    message = capsys.readouterr().err
    assert "bare.png holds no settings" in message
    assert message.endswith("; or name its prompt by --prompt\n")
    assert main(["explain", *given, "--prompt", "a red circle", "--num_shown", "3"]) == 0
    assert (world / "run/audit/explain.html").read_text().count("<img") == 4


def test_what_is_no_run_or_keeps_no_checkpoint_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(world / "query.png")
    assert main(["explain", str(tmp_path), image]) == 2
    assert "has no config.yaml, expected the folder of a training run" in capsys.readouterr().err
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((world / "run" / name).read_bytes())
    assert main(["explain", str(tmp_path), image]) == 2
    assert "has no checkpoint, whose gradients are needed" in capsys.readouterr().err
