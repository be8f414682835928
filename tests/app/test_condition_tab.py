"""The tab Condition: images of models that read an image, and what is said of other models."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from fakes_app import SIZE, STEPS, open_tiny, request_of
from fakes_conditions import controlnet_of
from fakes_pipeline import ddim, tiny_pipeline, tiny_unet
from PIL import Image

from latentdiff.app.image_request import (
    CONDITION,
    INPAINT,
    TEXT,
    find_problems,
    request_from_settings,
)
from latentdiff.app.kinds import KINDS
from latentdiff.app.library import NO_CONTROLNET
from latentdiff.app.model_facts import OWN_CONTROLNET, read_model_facts
from latentdiff.app.web_session import Finished, Opening
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import ModelInfo

PHOTO = Image.effect_noise((SIZE, SIZE), 90).convert("RGB")
CHANNELS = {"inpaint": 9, "instruct_pix2pix": 8, "upscale": 7, "depth": 5}


@pytest.fixture(scope="module", params=CHANNELS)
def opened(request, tmp_path_factory):
    """A session with a model of a kind open, its folder and its kind."""
    kind, folder = request.param, Path(tmp_path_factory.mktemp("kinds")) / "tiny"
    changes = {"num_class_embeds": 1000} if kind == "upscale" else {}
    unet = tiny_unet(in_channels=CHANNELS[kind], **changes)
    pipe = tiny_pipeline(unet=unet, scheduler=ddim())
    pipe.model_info = ModelInfo(condition_kind=kind)
    pipe.save_pretrained(folder)
    return open_tiny(folder), folder, kind


def test_an_image_of_the_tab_is_the_pipeline_s_own(opened):
    session, folder, kind = opened
    small, mask = PHOTO.resize((12, 5)), Image.new("L", PHOTO.size)
    mask.paste(255, (0, 0, SIZE // 2, SIZE))
    given = {
        "inpaint": {"image": PHOTO, "mask_image": mask, "strength": 1.0},
        "instruct_pix2pix": {"condition": PHOTO, "image_guidance_scale": 1.7},
        "upscale": {"condition": small, "noise_level": 30},
        "depth": {"condition": PHOTO},
    }[kind]
    found = made(session, kind=INPAINT if kind == "inpaint" else CONDITION, **given)
    expected = own(LatentDiffPipeline.from_pretrained(folder), **given)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


def made(session, **fields):
    """Return the pixels of the image that a session makes."""
    *_, last = session.generate(request_of(**fields))
    assert isinstance(last, Finished)
    return np.asarray(Image.open(last.entries[0].path), dtype=int)


def own(pipe, **call):
    """Return the pixels of the same image, made by the pipeline itself."""
    call |= {"num_inference_steps": STEPS, "seed": 1, "guidance_scale": 2.0}
    return np.asarray(pipe("a cat", **call).images[0], dtype=int)


def test_what_the_tab_fills_in_it_reads_back():
    fields = {"condition": PHOTO, "image_guidance_scale": 1.7, "noise_level": 30}
    fields |= {"controlnet": "edges", "controlnet_conditioning_scale": 0.5}
    tab = KINDS[CONDITION]
    assert tab.read(tab.fill(request_of(kind=CONDITION, **fields))) == fields


def test_the_page_says_which_tab_a_model_is_for(opened):
    session, _, kind = opened
    tab = "Inpaint" if kind == "inpaint" else "Condition"
    (message,) = find_problems(request_of(kind=TEXT), session.facts).values()
    assert message.startswith("tiny reads")
    assert message.endswith(f"go to the tab {tab}")
    found = find_problems(request_of(kind=CONDITION), session.facts)
    assert list(found) == (["condition"])
    assert ("choose a model that does" in found["condition"]) == (kind == "inpaint")
    assert dict(session.facts.rows)["Reads"]
    size = session.facts.size_of_condition(8, 4)
    assert size == ((44, 24) if kind != "upscale" else (32, 16))


def test_a_model_of_text_has_no_use_for_a_condition(session):
    found = find_problems(request_of(kind=CONDITION, condition=PHOTO), session.facts)
    message = "tiny reads no such image; choose a ControlNet or a model that does"
    assert found == {"condition": message}
    found = find_problems(request_of(kind=INPAINT, image=PHOTO, mask_image=PHOTO), session.facts)
    assert found == {}


@cache
def facts_of(kind, **info):
    changes = {"num_class_embeds": 1000} if kind == "upscale" else {}
    pipe = tiny_pipeline(unet=tiny_unet(in_channels=CHANNELS[kind], **changes))
    pipe.model_info = ModelInfo(condition_kind=kind, **info)
    return read_model_facts(pipe, name="tiny", path="tiny", max_px=1024, has_tiny_vae=True)


def test_an_image_too_large_to_be_enlarged_is_named():
    facts = facts_of("upscale")
    request = request_of(kind=CONDITION, condition=Image.new("RGB", (300, 200)))
    message = find_problems(request, facts)["condition"]
    assert message.startswith("300 x 200 pixels are too large to be enlarged 4 times here, expect")
    assert message.endswith("at most 16 a side, or more in windows")
    assert facts.size_of_condition(300, 200) == (64, 40)
    assert facts.size_of_condition(300, 200, in_windows=True) == (256, 168)
    assert find_problems(replace(request, windows=True), facts)["condition"].endswith("64 a side")
    request = request_of(kind=CONDITION, condition=Image.new("RGB", (16, 8)))
    assert find_problems(request, facts) == {}


def test_limits_are_those_of_the_training():
    facts = facts_of("upscale", max_noise_level=10)
    assert facts.max_noise_level == 10
    photo = {"kind": CONDITION, "condition": Image.new("RGB", (8, 8))}
    found = find_problems(request_of(**photo, noise_level=20), facts)
    assert found == {"noise_level": "expected 0 to 10, got 20"}
    facts = facts_of("instruct_pix2pix", condition_dropout=0.0)
    assert facts.image_guidance_scale == 1.0
    found = find_problems(request_of(**photo, image_guidance_scale=1.5), facts)
    assert found == {"image_guidance_scale": "expected 1 to 1, got 1.5"}
    assert facts_of("instruct_pix2pix").image_guidance_scale == 1.5


def test_a_model_that_edits_has_no_tiny_vae_on_the_page():
    assert len(facts_of("upscale").vaes) == 2
    assert len(facts_of("instruct_pix2pix").vaes) == 1


def test_settings_of_a_condition_are_named_as_what_is_not_taken(session):
    call = {"prompt": "a cat", "noise_level": 30, "window_size": 16}
    settings = {"call": call, "inputs": {"condition": "0" * 16}}
    request, notes = request_from_settings(settings, request_of(), facts=session.facts, loras=[])
    assert request.prompt == "a cat"
    assert notes == [
        "made with noise level 30, window size 16, which are not taken",
        "the image it was made from is not in the file",
    ]


@pytest.fixture
def net(session, tmp_path):
    """The folder of a ControlNet that the session's library has."""
    folder = tmp_path / "edges"
    controlnet_of(session._pipe.unet, 0).save_pretrained(folder)
    session.library = replace(session.library, given_controlnets=(str(folder),))
    return folder


def test_a_controlnet_steers_the_images_of_its_tab_alone(session, model, net):
    plain = made(session)
    given = {"kind": CONDITION, "condition": PHOTO, "controlnet": "edges"}
    given["controlnet_conditioning_scale"] = 0.8
    pipe = LatentDiffPipeline.from_pretrained(model, controlnet=net)
    call = {"condition": PHOTO, "controlnet_conditioning_scale": 0.8}
    assert np.abs(made(session, **given) - own(pipe, **call)).max() <= 1
    assert np.abs(made(session, **given) - plain).max() > 1
    assert np.array_equal(made(session), plain)
    controlnet_of(pipe.unet, 1).save_pretrained(net)  # trained on, and read again
    again = LatentDiffPipeline.from_pretrained(model, controlnet=net)
    assert np.abs(made(session, **given) - own(again, **call)).max() <= 1
    with pytest.raises(ValueError, match="no ControlNet 'poses'; known: edges"):
        made(session, **given | {"controlnet": "poses"})


def test_a_controlnet_of_another_model_is_named_and_leaves_the_model_as_it_is(session, net):
    plain = made(session)
    controlnet_of(tiny_unet(cross_attention_dim=8), 0).save_pretrained(net)
    with pytest.raises(ValueError, match="this ControlNet is of another model"):
        made(session, kind=CONDITION, condition=PHOTO, controlnet="edges")
    assert np.array_equal(made(session), plain)


def test_a_controlnet_that_a_model_s_folder_holds_is_a_choice(tmp_path):
    pipe = tiny_pipeline(scheduler=ddim())
    pipe.load_controlnet(controlnet_of(pipe.unet, 0))
    pipe.save_pretrained(tmp_path / "tiny")
    session = open_tiny(tmp_path / "tiny")
    assert list(session.controlnets()) == [OWN_CONTROLNET]
    made(session)  # text alone
    found = made(session, kind=CONDITION, condition=PHOTO, controlnet=OWN_CONTROLNET)
    assert np.abs(found - own(pipe, condition=PHOTO)).max() <= 1


def test_a_controlnet_and_a_model_that_reads_an_image_exclude_each_other():
    facts = facts_of("instruct_pix2pix")
    request = request_of(kind=CONDITION, condition=PHOTO, controlnet="edges")
    message = find_problems(request, facts)["controlnet"]
    assert message.endswith(f"steers models of text alone: choose {NO_CONTROLNET}")
    assert find_problems(replace(request, kind=TEXT), facts_of("upscale")).keys() == {"prompt"}


def test_a_run_of_a_controlnet_appears_when_it_has_ended(session, tmp_path):
    session.library = replace(session.library, runs_dir=tmp_path)
    run = tmp_path / "edges"
    (run / "checkpoints").mkdir(parents=True)
    assert session.controlnets() == {}
    controlnet_of(session._pipe.unet, 0).save_pretrained(run / "controlnet")
    assert session.controlnets() == {"edges": str(run)}
    request = request_of(kind=CONDITION, condition=PHOTO, controlnet="edges")
    assert Opening("edges") in list(session.generate(request))


def test_a_wide_image_is_made_in_windows_as_the_pipeline_makes_it(session, model):
    size, facts = {"width": 3 * SIZE, "height": SIZE}, session.facts
    assert find_problems(request_of(**size), facts).keys() == {"width"}
    found = made(session, **size, windows=True, window_overlap=0.25)
    windows = {"window_size": SIZE, "window_overlap": 0.25}
    assert (
        np.abs(found - own(LatentDiffPipeline.from_pretrained(model), **size, **windows)).max() <= 1
    )
    assert facts.windows_note(3 * SIZE, SIZE, overlap=0.5) == (
        "5 windows of 32 px: each step takes 5 passes of the U-Net"
    )
    assert facts.windows_note(SIZE, SIZE, overlap=0.5) == ""
    assert np.array_equal(made(session, windows=True), made(session))
    settings = {"call": {"prompt": "a cat", **size, **windows}}
    request, notes = request_from_settings(settings, request_of(), facts=facts, loras=[])
    assert (request.windows, request.window_overlap, request.width) == (True, 0.25, 3 * SIZE)
    assert notes == []
