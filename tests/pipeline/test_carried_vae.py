"""A model's tiny VAE: found by name, told in the settings of images, unseen by stock diffusers."""

import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from fakes_models import make_tiny_vae
from fakes_pipeline import SIZE, tiny_pipeline
from fakes_scripts import run_script
from PIL import Image

from latentdiff.models.components import carry_tiny_vae
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.png_metadata import read_settings
from latentdiff.sampling.open_pipeline import open_pipeline

CALL = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carrier") / "model"
    tiny_pipeline().save_pretrained(folder)
    torch.manual_seed(0)
    make_tiny_vae().save_pretrained(folder / "vae_tiny")
    return folder


def sample(*arguments):
    return run_script("sample.py", *arguments, "--steps", 2, "--dtype", "float32")


def latents():
    return torch.randn(1, 4, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(1))


def test_it_decodes_what_stock_diffusers_decodes_with_it(model):
    ours = LatentDiffPipeline.from_pretrained(model, vae="tiny")
    tiny = AutoencoderTiny.from_pretrained(model, subfolder="vae_tiny")
    stock = StableDiffusionPipeline.from_pretrained(model, vae=tiny)
    size = {"height": SIZE, "width": SIZE}
    images = [pipe(**CALL, latents=latents(), **size).images for pipe in (ours, stock)]
    assert np.abs(images[0] - images[1]).max() <= 1 / 255
    own = LatentDiffPipeline.from_pretrained(model)(**CALL, latents=latents()).images
    assert np.abs(images[0] - own).max() > 0.05


def test_without_it_folder_and_images_are_as_before(model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("vae_tiny"))
    before, after = (LatentDiffPipeline.from_pretrained(path) for path in (bare, model))
    assert np.array_equal(before(**CALL, seed=1).images, after(**CALL, seed=1).images)
    assert isinstance(StableDiffusionPipeline.from_pretrained(model).vae, AutoencoderKL)


def test_the_name_the_folder_and_the_component_are_the_same_choice(model):
    tiny = AutoencoderTiny.from_pretrained(model / "vae_tiny")
    chosen = [
        LatentDiffPipeline.from_pretrained(model, vae=tiny),
        LatentDiffPipeline.from_pretrained(model, vae="tiny"),
        LatentDiffPipeline.from_pretrained(model, vae=str(model / "vae_tiny")),
        open_pipeline(str(model), vae="tiny"),
    ]
    first, *others = (pipe(**CALL, seed=1).images for pipe in chosen)
    assert all(np.array_equal(first, other) for other in others)


def test_one_of_other_latents_is_refused(model, tmp_path):
    other = AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the VAE's latents have 8"):
        LatentDiffPipeline.from_pretrained(model, vae=str(tmp_path / "other"))


def test_its_images_tell_of_it_and_are_not_taken_for_the_model_s_own(
    model, tmp_path, capsys, caplog
):
    out = tmp_path / "out"
    assert sample(model, "a cat", "--out", out, "--vae", "tiny") == 0
    assert read_settings(out / "000000.png")["model"]["vae"] == "AutoencoderTiny"
    assert sample(model, "a cat", "--out", out, "--vae", "tiny") == 0  # made already
    assert sample(model, "a cat", "--out", out) == 2
    assert "an image of another VAE, --vae" in capsys.readouterr().err
    assert sample(model, "a cat", "--out", tmp_path / "own") == 0
    assert "vae" not in read_settings(tmp_path / "own" / "000000.png")["model"]
    again = ["--settings_from", out / "000000.png", "--vae", "tiny"]
    with caplog.at_level(logging.WARNING):
        assert sample(model, *again, "--out", tmp_path / "again") == 0
    assert "give it by --vae" in caplog.text
    first, second = (Image.open(path / "000000.png") for path in (out, tmp_path / "again"))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_a_model_without_one_says_how_to_train_it(model, tmp_path, capsys):
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("vae_tiny"))
    assert sample(bare, "a cat", "--out", tmp_path / "a.png", "--vae", "tiny") == 2
    assert f"{bare} carries no tiny VAE" in capsys.readouterr().err


def test_a_new_model_takes_none_along_from_where_it_is_made(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model)
    carry_tiny_vae("", tmp_path)
    assert not (tmp_path / "vae_tiny").exists()
