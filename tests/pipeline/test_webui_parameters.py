"""A1111's `parameters` text is written and read."""

import pytest
from fakes_pipeline import tiny_pipeline
from PIL import Image, PngImagePlugin

from latentdiff.pipeline.png_metadata import read_settings, scheduler_metadata
from latentdiff.pipeline.schedulers import make_scheduler, scheduler_name, scheduler_names
from latentdiff.pipeline.webui_parameters import parameters_text, read_parameters

WEBUI = """a (red:1.2) fox, <lora:ink:0.7> forest
at dawn
Negative prompt: blurry,
text
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 123, Size: 512x768, \
Model hash: 6ce0161689, Model: "a, b", Clip skip: 2, Denoising strength: 0.4, Version: v1.10.1"""


def test_image_carries_the_text_that_other_tools_read(tmp_path):
    pipe = tiny_pipeline()
    pipe.set_scheduler("dpm++2m-karras")
    call = {"negative_prompt": "sea, sky", "seed": 9, "num_inference_steps": 2}
    pipe("a 漢字 heart", guidance_scale=3.5, **call).images[0].save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        text = image.info["parameters"]
    start = (
        "a 漢字 heart\nNegative prompt: sea, sky\nSteps: 2, Sampler: DPM++ 2M, "
        "Schedule type: Karras, CFG scale: 3.5, Seed: 9, Size: 32x32, "
    )
    assert text.startswith(start)
    ours, theirs = read_settings(tmp_path / "image.png"), read_parameters(text)
    assert theirs["call"].items() <= ours["call"].items()
    assert scheduler_name(theirs["scheduler"]) == scheduler_name(ours["scheduler"])


def test_webui_image_is_read(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", WEBUI)
    Image.new("RGB", (4, 4)).save(tmp_path / "webui.png", pnginfo=chunks)
    settings = read_settings(tmp_path / "webui.png")
    assert settings["call"] == {
        "prompt": "a (red:1.2) fox,  forest\nat dawn",
        "negative_prompt": "blurry,\ntext",
        "num_inference_steps": 28,
        "guidance_scale": 6.5,
        "seed": 123,
        "strength": 0.4,
        "height": 768,
        "width": 512,
        "clip_skip": 1,
    }
    assert scheduler_name(settings["scheduler"]) == "dpm++2m-karras"
    assert settings["model"] == {"name": "a, b"}
    assert settings["loras"] == {"ink": 0.7}


def test_every_scheduler_keeps_its_name():
    trained = tiny_pipeline().scheduler
    for name in scheduler_names():
        settings = {"scheduler": scheduler_metadata(make_scheduler(name, trained=trained))}
        text = parameters_text({"call": {"prompt": "", "num_inference_steps": 3}, **settings})
        assert scheduler_name(read_parameters(text)["scheduler"]) == name


def test_unknown_sampler_is_named_and_verbatim_brackets_are_escaped():
    old = read_parameters("a cat\nSteps: 3, Sampler: DPM++ SDE Karras, Seed: 1")
    assert old["scheduler"] == {"name": "DPM++ SDE Karras"}
    call = {"prompt": "a clock (12:30)", "prompt_weighting": False}
    assert parameters_text({"call": call}).startswith(r"a clock \(12:30\)")


def test_text_that_states_no_settings_is_an_error():
    for text in ("a cat", "", "a cat\nSteps: many", "a cat\nSteps: 3, Size: 12"):
        with pytest.raises(ValueError, match=r"names no|expected a number"):
            read_parameters(text)
