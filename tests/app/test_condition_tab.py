"""The tab Condition: images of models that read an image, and what is said of other models."""

from pathlib import Path

import numpy as np
import pytest
from fakes_app import SIZE, open_tiny, request_of
from fakes_pipeline import ddim, tiny_pipeline, tiny_unet
from PIL import Image

from latentdiff.app.image_request import CONDITION, INPAINT, TEXT, find_problems
from latentdiff.app.kinds import KINDS
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
        return
    fields = {"condition": PHOTO, "image_guidance_scale": 1.7, "noise_level": 30}
    request = request_of(kind=CONDITION, **fields)
    assert KINDS[CONDITION].read(KINDS[CONDITION].fill(request)) == fields
    *_, last = session.generate(request)
    assert isinstance(last, Finished)
    pipe = LatentDiffPipeline.from_pretrained(folder)
    call = {"num_inference_steps": request.num_inference_steps, "seed": 1, "guidance_scale": 2.0}
    if kind == "upscale":
        small = PHOTO.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX)
        call |= {"condition": small, "noise_level": 30}
    else:
        call |= {"condition": PHOTO, "image_guidance_scale": 1.7}
    expected = np.asarray(pipe("a cat", **call).images[0], dtype=int)
    found = np.asarray(Image.open(last.entries[0].path), dtype=int)
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
    size = session.facts.size_of_condition(8, 8)
    assert size == ((SIZE, SIZE) if kind != "upscale" else (32, 32))


def test_a_model_of_text_has_no_use_for_a_condition(session):
    found = find_problems(request_of(kind=CONDITION, condition=PHOTO), session.facts)
    assert found == {"condition": "tiny reads no such image; choose a model that does"}
    found = find_problems(request_of(kind=INPAINT, image=PHOTO, mask_image=PHOTO), session.facts)
    assert found == {}
