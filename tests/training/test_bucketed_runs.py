"""Whole runs on images of several shapes: buckets, crops, captions, with and without a cache."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_faults import start_ranks
from fakes_models import make_vae
from fakes_shapes import write_three_shapes
from fakes_training import make_config, read_metrics, write_world
from safetensors.torch import load_file

from latentdiff.config.io import parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.data.cache.online_encode import OnlineLatentEncoder
from latentdiff.training.inputs.encode import (
    bucket_sizes,
    caption_transform,
    crop_plan,
    eval_crop_config,
)
from latentdiff.training.inputs.sources import read_data
from latentdiff.training.text_to_image.components import check_components
from latentdiff.training.text_to_image.train_t2i import default_prompts, train

STEPS = 8
DATA = {
    "resolution": 32,
    "buckets": True,
    "bucket_multiple": 8,  # VAE factor 4 x U-Net factor 2
    "random_flip": True,
    "num_crops": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shapes")
    write_three_shapes(folder / "data")
    return write_world(folder, DATA)


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run of two epochs of four steps: 4 + 2 wide images, 3 tall ones, 2 square ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(make_config(world, world / "whole", train__max_steps=STEPS)) == 0
    return world / "whole"


def assert_same_losses(run: Path, other: Path, *, rel: float) -> None:
    ours, theirs = read_metrics(run), read_metrics(other)
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=rel)


def final_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:09d}" / "model.safetensors")


def test_a_bucket_multiple_that_does_not_fit_is_refused_before_any_weight_is_loaded(
    world: Path, tmp_path: Path
) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text((world / "vae" / "config.json").read_text())
    settings = {"data__bucket_multiple": 4, "model__vae": tmp_path / "vae"}
    with pytest.raises(ValueError, match="bucket_multiple=4 must be a multiple of 8"):
        train(make_config(world, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()
    check_components(make_config(world, tmp_path / "run", **settings, data__buckets=False))


def test_a_pretrained_model_refuses_buckets_that_it_cannot_take(
    world: Path, sd_folder: Path, tmp_path: Path
) -> None:
    settings = {"model__vae": "", "model__pretrained": sd_folder, "data__bucket_multiple": 4}
    with pytest.raises(ValueError, match="bucket_multiple=4 must be a multiple of 8"):
        check_components(make_config(world, tmp_path / "run", **settings))
    check_components(
        make_config(world, tmp_path / "run", **settings | {"data__bucket_multiple": 8})
    )


def test_sheets_have_captions_as_the_model_was_trained_on_them(world: Path) -> None:
    config = make_config(
        world, world / "none", data__trigger_word="sks", data__caption_suffix=", photo"
    )
    train_data, heldout = read_data(config.data)
    train_data: Any = SimpleNamespace(
        train=train_data, heldout=heldout, transform=caption_transform(config.data)
    )
    prompts = default_prompts(train_data)
    assert len(set(prompts)) == len(prompts)
    assert len(prompts) == 4  # three held-out captions, and one of a training image
    assert len(heldout) == 3
    assert prompts[0] == f"sks, {heldout[0].captions[0]}, photo"


def test_images_are_cropped_to_the_bucket_of_their_own_shape(world: Path) -> None:
    config = make_config(world, world / "none")
    assert [str(bucket) for bucket in bucket_sizes(config.data)] == [
        "24 x 40",
        "32 x 32",
        "40 x 24",
    ]
    train_data, heldout = read_data(config.data)
    sizes = crop_plan(train_data, config.data).sizes.tolist()
    assert sizes == [[24, 40]] * 6 + [[40, 24]] * 3 + [[32, 32]] * 2
    plan = crop_plan(heldout, eval_crop_config(config.data))
    assert plan.sizes.tolist() == [[24, 40], [40, 24], [32, 32]]
    assert plan.places == (0.5,)
    assert plan.has_room.tolist() == [False, True, False]  # 60 x 36 becomes 40 x 24 whole


def test_a_smaller_batch_is_a_mean_over_its_own_images(whole: Path) -> None:
    losses = list(read_metrics(whole).values())
    assert len(losses) == STEPS
    assert min(losses[:4]) > 0.75, "a sum over 2 images divided by 4 would be half as large"
    assert read_metrics(whole, "heldout_loss").keys() == {STEPS}


@pytest.mark.parametrize("stop", [2, 7])  # within an epoch, and the next
def test_resume_within_a_bucketed_epoch_is_bitwise(
    world: Path, whole: Path, tmp_path: Path, stop: int
) -> None:
    assert train(make_config(world, tmp_path / "run", train__max_steps=stop)) == 0
    assert train(make_config(world, tmp_path / "run", train__max_steps=STEPS)) == 0
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
    ours, theirs = final_weights(tmp_path / "run", STEPS), final_weights(whole, STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "layout",
    [{"train__micro_batch_size": 1}, {"train__micro_batch_size": 3, "data__num_workers": 2}],
)
def test_layout_does_not_change_the_losses(
    world: Path, whole: Path, tmp_path: Path, layout: dict[str, Any]
) -> None:
    assert train(make_config(world, tmp_path / "run", train__max_steps=STEPS, **layout)) == 0
    assert_same_losses(tmp_path / "run", whole, rel=1e-5)


def test_two_processes_train_on_the_same_buckets(world: Path, whole: Path, tmp_path: Path) -> None:
    child = start_ranks(world, tmp_path / "run", train__max_steps=STEPS)
    assert child.wait() == 0, child.output()
    assert "(2 processes x 2 x 1 accumulated), 4 steps an epoch" in child.output()
    assert_same_losses(tmp_path / "run", whole, rel=1e-5)


def test_training_from_the_cache_equals_training_without_it(
    world: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = {"train__max_steps": STEPS, "data__cache": "false", "data__num_workers": 1}
    config = make_config(world, tmp_path / "run", **settings, data__cache_dir=tmp_path / "cache")
    assert train(config) == 0
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert "latents are encoded at every step" in caplog.text
    assert_same_losses(tmp_path / "run", whole, rel=1e-4)
    ours, theirs = (read_metrics(run, "heldout_loss")[STEPS] for run in (tmp_path / "run", whole))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_cropping_anywhere_trains_without_a_cache(world: Path, tmp_path: Path) -> None:
    settings = {"train__max_steps": 2, "data__cache": "false", "data__num_crops": 0}
    assert train(make_config(world, tmp_path / "run", **settings)) == 0


def test_filled_batches_are_all_of_full_size(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = {"train__max_steps": 4, "data__partial_batches": "fill"}
    assert train(make_config(world, tmp_path / "run", **settings)) == 0
    assert "3 buckets (images each) 24 x 40: 3, 32 x 32: 2, 40 x 24: 6" in caplog.text
    assert "filled with images again" in caplog.text
    assert min(read_metrics(tmp_path / "run").values()) > 0.75


def test_embeddings_made_in_the_step_are_those_of_the_cache(
    world: Path, sd_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Captions of one tag read the same however their tags are shuffled."""
    caplog.set_level(logging.INFO)
    write_three_shapes(tmp_path / "data", comma="")
    settings = {
        "data__root": tmp_path / "data",
        "model__vae": "",
        "model__pretrained": sd_folder,
        "train__max_steps": 4,
        "data__trigger_word": "sks",
    }
    assert train(make_config(world, tmp_path / "kept", **settings)) == 0
    assert "prompt embeddings are encoded once and cached" in caplog.text
    assert train(make_config(world, tmp_path / "made", **settings, data__shuffle_tags="true")) == 0
    assert "tags change, so the frozen text encoder runs at every step" in caplog.text
    assert_same_losses(tmp_path / "made", tmp_path / "kept", rel=1e-5)
    plain = settings | {"data__trigger_word": ""}
    assert train(make_config(world, tmp_path / "plain", **plain)) == 0
    assert read_metrics(tmp_path / "plain") != read_metrics(tmp_path / "kept")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.buckets=true", "--data.resolution=500"],
            "not a multiple of data",
        ),
        (["--data.num_crops=0"], r"add --data\.cache=false"),
        (["--data.num_crops=-1"], r"data\.num_crops=-1, expected a number of at least 0"),
        (["--data.tag_dropout=1"], "below 1"),
        (["--data.bucket_max_aspect=0.5"], r"data\.bucket_max_aspect=0\.5"),
        (["--data.partial_batches=drop"], "partial_batches"),
    ],
)
def test_settings_that_do_not_fit_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(Config, arguments)


def test_a_damaged_image_is_named_at_the_step_that_reads_it(world: Path, tmp_path: Path) -> None:
    from latentdiff.models.latents import LatentCodec

    data = write_three_shapes(tmp_path / "data")
    config = make_config(world, tmp_path / "run", data__root=data, data__cache="false")
    train_data, _ = read_data(config.data)
    encoder = OnlineLatentEncoder(
        train_data, LatentCodec(make_vae()), plan=crop_plan(train_data, config.data)
    )
    path = data / "train" / "01.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"01\.png cannot be encoded"):
        encoder.images.pixels(1, flipped=False, crop=0.5)
