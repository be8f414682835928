"""The tab Condition: images of models that read an image, and what is said of other models."""

from pathlib import Path

import numpy as np
import pytest
from fakes_app import SIZE, open_tiny, request_of
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
from latentdiff.app.model_facts import read_model_facts
from latentdiff.app.web_session import Finished
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import ModelInfo

PHOTO = Image.effect_noise((SIZE, SIZE), 90).convert("RGB")
CHANNELS = {"inpaint": 9, "instruct_pix2pix": 8, "upscale": 7}


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
    if kind == "inpaint":
        pytest.skip("its tab is Inpaint")
    small = PHOTO.resize((12, 5))
    fields = {"condition": small if kind == "upscale" else PHOTO}
    fields |= {"image_guidance_scale": 1.7, "noise_level": 30}
    request = request_of(kind=CONDITION, **fields)
    assert KINDS[CONDITION].read(KINDS[CONDITION].fill(request)) == fields
    *_, last = session.generate(request)
    assert isinstance(last, Finished)
    pipe = LatentDiffPipeline.from_pretrained(folder)
    call = {"num_inference_steps": request.num_inference_steps, "seed": 1, "guidance_scale": 2.0}
    if kind == "upscale":
        call |= {"condition": small, "noise_level": 30}
    else:
        call |= {"condition": PHOTO, "image_guidance_scale": 1.7}
    expected = np.asarray(pipe("a cat", **call).images[0], dtype=int)
    found = np.asarray(Image.open(last.entries[0].path), dtype=int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


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
    assert found == {"condition": "tiny reads no such image; choose a model that does"}
    found = find_problems(request_of(kind=INPAINT, image=PHOTO, mask_image=PHOTO), session.facts)
    assert found == {}


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
    assert "at most 16 a side" in message
    assert facts.size_of_condition(300, 200) == (64, 40)
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
    call = {"prompt": "a cat", "noise_level": 30, "window_size": 32}
    settings = {"call": call, "inputs": {"condition": "0" * 16}}
    request, notes = request_from_settings(settings, request_of(), facts=session.facts, loras=[])
    assert request.prompt == "a cat"
    assert notes == [
        "made with noise level 30, window size 32, which are not taken",
        "the image it was made from is not in the file",
    ]
