"""The sample command with images as conditions, ControlNets and windows."""

import json

import pytest
from diffusers import AutoencoderKL
from fakes_pipeline import ddim, tiny_pipeline, tiny_unet
from fakes_scripts import run_script
from PIL import Image

from latentdiff.models.unet.controlnet import make_controlnet
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.pipeline.png_metadata import read_settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of text, an upscaler, two ControlNets of runs, and images."""
    folder = tmp_path_factory.mktemp("conditions")
    pipe = tiny_pipeline(scheduler=ddim())
    pipe.save_pretrained(folder / "text")
    for k in range(2):
        net = make_controlnet(pipe.unet, factor=4, seed=k)
        net.save_pretrained(folder / f"run{k}" / "controlnet")
        Image.new("RGB", (32, 32), (90 * k, 0, 200)).save(folder / f"layout{k}.png")
        Image.new("RGB", (8, 8), (0, 90 * k, 200)).save(folder / f"small{k}.png")
    unet = tiny_unet(in_channels=7, num_class_embeds=1000)
    upscaler = tiny_pipeline(unet=unet, scheduler=ddim())
    upscaler.model_info = ModelInfo(condition_kind="upscale", max_noise_level=100)
    upscaler.save_pretrained(folder / "upscaler")
    return folder


def run(*arguments):
    return run_script("sample.py", *arguments, "--steps", 1)


def test_a_folder_of_enlarged_images_is_completed_and_others_are_refused(world, tmp_path, capsys):
    arguments = [world / "upscaler", "a cat", "--out", tmp_path / "out"]
    first = ["--condition", world / "small0.png", "--noise_level", 10]
    assert run(*arguments, *first) == 0
    settings = read_settings(tmp_path / "out" / "000000.png")
    assert settings["call"]["noise_level"] == 10
    assert settings["call"]["height"] == 32
    assert run(*arguments, *first, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 0
    for changes, name in (
        (["--condition", world / "small1.png", "--noise_level", 10], "condition"),
        (["--condition", world / "small0.png", "--noise_level", 11], "noise_level"),
    ):
        assert run(*arguments, *changes) == 2
        assert f"an image of another {name};" in capsys.readouterr().err


def test_several_controlnets_take_an_image_each(world, tmp_path):
    nets, images = (
        [str(world / name) for name in names]
        for names in (
            ("run0", "run1"),
            ("layout0.png", "layout1.png"),
        )
    )
    out = tmp_path / "out"
    arguments = [world / "text", "a cat", "--out", out, "--controlnet", f"[{','.join(nets)}]"]
    arguments += ["--condition", f"[{','.join(images)}]"]
    arguments += ["--controlnet_conditioning_scale", "[0.5,1.5]"]
    assert run(*arguments) == 0
    assert run(*arguments) == 0
    settings = read_settings(out / "000000.png")
    assert settings["call"]["controlnet_conditioning_scale"] == [0.5, 1.5]
    assert {"condition", "condition_1"} <= settings["inputs"].keys()


def test_a_command_takes_one_condition_for_all_prompts(world, tmp_path, capsys):
    two = f"[{world / 'small0.png'},{world / 'small1.png'}]"
    arguments = ["a cat", "a dog", "--out", tmp_path / "out", "--condition", two]
    assert run(world / "upscaler", *arguments) == 2
    assert "names 2 images, expected one for all prompts" in capsys.readouterr().err


def test_a_wide_image_in_windows_is_resumed(world, tmp_path, capsys):
    arguments = [world / "text", "a cat", "--out", tmp_path / "out", "--width", 64]
    assert run(*arguments, "--window_size", 32) == 0
    assert run(*arguments, "--window_size", 32) == 0
    assert run(*arguments, "--window_size", 48) == 2
    assert "an image of another window_size;" in capsys.readouterr().err


def test_a_wide_image_is_decoded_in_tiles_where_asked_for(world, tmp_path, monkeypatch):
    sizes, decode = [], AutoencoderKL.tiled_decode
    monkeypatch.setattr(
        AutoencoderKL,
        "tiled_decode",
        lambda vae, z, **options: sizes.append(z.shape[-2:]) or decode(vae, z, **options),
    )
    arguments = [world / "text", "a cat", "--width", 96, "--window_size", 32]
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    assert sizes == []
    assert run(*arguments, "--out", tmp_path / "tiles", "--vae_tiling", "true") == 0
    assert sizes == [(8, 24)]
    whole, tiles = (Image.open(tmp_path / one / "000000.png") for one in ("whole", "tiles"))
    assert tiles.size == whole.size == (96, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["upscaler"], "condition is missing"),
        (["upscaler", "--condition", "nowhere.png"], "condition nowhere.png is not a readable"),
        (["upscaler", "--condition", "[x,y]"], "condition x is not a readable image"),
        (["text", "--condition", "layout0.png"], "this model reads text alone"),
        (["text", "--controlnet", "./nowhere"], "there is no ControlNet ./nowhere"),
        (["text", "--window_size", "32", "--trace", "true"], "leave out one of the two"),
        (["upscaler", "--condition", "small0.png", "--noise_level", "200"], "in 0..100"),
    ],
)
def test_bad_input_is_one_line_and_status_two(world, tmp_path, capsys, given, message):
    found = [world / one if (world / one).exists() else one for one in given]
    assert run(*found[:1], "a cat", "--out", tmp_path / "sheet.png", *found[1:]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
