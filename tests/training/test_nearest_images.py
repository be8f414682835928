"""The nearest training image next to each sample, and that a copy is found."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_data import captioned_folder, noise_image
from fakes_training import make_config, make_world, read_metrics
from PIL import Image

from latentdiff.data.cache.decode_ahead import CropPlan
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.evaluation.metrics.features import thumbnail_features
from latentdiff.training.text_to_image.nearest_images import NearestImages, summarize_nearest
from latentdiff.training.text_to_image.train_t2i import train

SHARED = Path(os.environ.get("LATENTDIFF_SHARED", Path(__file__).parents[3] / "shared"))
NETWORK = SHARED / "weights" / "mobilenet-v1-025-imagenet"
needs_network = pytest.mark.skipif(not NETWORK.is_dir(), reason=f"{NETWORK} is not there")
FEATURES = ["", pytest.param(str(NETWORK), marks=needs_network)]


def plan_crops(folder: Folder) -> CropPlan:
    return CropPlan(np.full((len(folder), 2), 32, np.int32))


def seen(seed: int) -> Image.Image:
    return resize_and_crop(noise_image(seed), height=32, width=32).image


@pytest.mark.parametrize("features", FEATURES)
def test_a_planted_copy_is_found_and_named(tmp_path: Path, features: str) -> None:
    train_data = read_folder(captioned_folder(tmp_path / "train", 20))
    root = tmp_path / "held out"
    for i in range(20, 30):
        root.mkdir(exist_ok=True)
        noise_image(i).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text("a caption")
    nearest_images = NearestImages(
        train_data, read_folder(root), plan_crops=plan_crops, num=100, features=features
    )
    noise = np.random.default_rng(0).integers(-3, 4, (32, 32, 3)) if not features else 0
    copied = Image.fromarray((np.asarray(seen(7)) + noise).clip(0, 255).astype(np.uint8))
    copy, fresh = nearest_images.find([copied, seen(50)])
    assert copy.name == "7.png"
    assert copy.is_copy
    assert "nearest: 7.png" in copy.label
    assert "A COPY" in copy.label
    assert not fresh.is_copy
    assert 0 <= copy.score < fresh.score <= 1
    assert fresh.distance <= 2
    np.testing.assert_array_equal(np.asarray(copy.image), np.asarray(seen(7)))
    figures = summarize_nearest([copy, fresh])
    assert figures["copies"] == 0.5
    assert figures["nearest_score_min"] == copy.score
    assert figures["nearest_distance"] == pytest.approx((copy.distance + fresh.distance) / 2)


def test_a_subsample_is_compared_and_without_heldout_images_none_is_called_a_copy(
    tmp_path: Path,
) -> None:
    folder = read_folder(captioned_folder(tmp_path / "train", 9))
    nearest_images = NearestImages(folder, folder[:0], plan_crops=plan_crops, num=3)
    assert [record.id for record in nearest_images.train] == ["0.png", "4.png", "8.png"]
    found = nearest_images.find([seen(4)])[0]
    assert (found.name, found.is_copy) == ("4.png", None)
    assert found.distance == 0
    assert "copies" not in summarize_nearest([found])


def test_distance_of_thumbnails_is_a_root_mean_square() -> None:
    black, grey = torch.full((1, 3, 40, 24), -1.0), torch.full((1, 3, 40, 24), -0.5)
    a, b = thumbnail_features(torch.cat([black, grey]))
    assert a.shape == (768,)
    assert float((a - b).norm()) == pytest.approx(0.5)
    pixels = to_pixels(noise_image(1))[None]
    assert torch.equal(thumbnail_features(pixels), thumbnail_features(pixels))


def test_a_run_logs_the_gap_and_the_nearest_images_of_its_samples(tmp_path: Path) -> None:
    world, run = make_world(tmp_path), tmp_path / "run"
    settings = {"preview__prompts": '["a red star"]', "eval__every_steps": 1}
    assert train(make_config(world, run, train__max_steps=2, **settings)) == 0
    for name in ("nearest_distance", "nearest_score", "nearest_score_min", "copies"):
        assert read_metrics(run, name).keys() == {0, 2}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "heldout_loss" in row]
    assert [row["step"] for row in measured] == [0, 1, 2]
    for row in measured:
        gap = row["heldout_loss"] - row["train_loss_fixed"]
        assert row["heldout_gap"] == pytest.approx(gap, abs=1e-6)
        assert row["heldout_gap_se"] > 0
    sheet = Image.open(run / "samples" / "step-000000002.png")
    assert sheet.width == 8 + 2 * (128 + 8)  # the sample, and its neighbour


def test_a_training_image_that_is_gone_costs_the_sheet_its_neighbours_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, run = make_world(tmp_path), tmp_path / "run"
    config = make_config(world, run, train__max_steps=2, preview__prompts='["a red star"]')

    def gone(self: Folder, index: int) -> bytes:
        raise FileNotFoundError(self[index].id)

    assert train(make_config(world, tmp_path / "first", train__max_steps=1)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Folder, "read_bytes", gone)
    assert train(config) == 0
    assert "nearest training images are not shown" in caplog.text
    assert Image.open(run / "samples" / "step-000000002.png").width == 8 + 128 + 8
    assert not read_metrics(run, "nearest_distance")
