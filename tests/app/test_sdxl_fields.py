"""The page with SDXL: second prompts and sizes, checked, made, and read from files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes_app import open_tiny, request_of
from fakes_sdxl import sdxl_pipeline
from PIL import Image

from latentdiff.app.image_request import find_problems, request_from_settings
from latentdiff.app.web_session import Finished
from latentdiff.pipeline.png_metadata import read_settings

GIVEN = {
    "prompt_2": "a dog",
    "negative_prompt_2": "blue sea",
    "original_size": "40x24",
    "crops_coords_top_left": "5, 3",
    "negative_target_size": " 16 x 8 ",
}
STATED = {
    "prompt_2": "a dog",
    "negative_prompt": "",
    "negative_prompt_2": "blue sea",
    "original_size": [24, 40],
    "crops_coords_top_left": [3, 5],
    "negative_target_size": [8, 16],
}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A session with a tiny SDXL open."""
    folder = Path(tmp_path_factory.mktemp("models")) / "tiny"
    sdxl_pipeline().save_pretrained(folder)
    return open_tiny(folder)


def test_second_prompts_and_sizes_reach_the_image_and_come_back_from_its_file(sdxl):
    request = request_of(**GIVEN)
    *_, last = sdxl.generate(request)
    assert isinstance(last, Finished)
    settings = read_settings(last.entries[0].path)
    assert {name: settings["call"][name] for name in STATED} == STATED
    expected = sdxl_pipeline()(**settings["call"]).images[0]
    found = np.asarray(Image.open(last.entries[0].path), dtype=int)
    assert np.abs(found - np.asarray(expected, dtype=int)).max() <= 1
    now = request_of(target_size="8 x 8")
    again, notes = request_from_settings(settings, now, facts=sdxl.facts, loras=[])
    typed = {"original_size": "40 x 24", "crops_coords_top_left": "5 x 3"}
    typed |= {"negative_target_size": "16 x 8", "scheduler": "euler"}
    assert again == replace(request, **typed)
    assert notes == []
    assert last.entries[0].request == request  # what "use again" puts back


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"original_size": "wide"}, "original_size", "such as 1024 x 768, got 'wide'"),
        ({"target_size": "0 x 8"}, "target_size", "two ints, each in 1.."),
        ({"negative_crops_coords_top_left": "-1 x 8"}, "negative_crops_coords_top_left", "-1"),
        ({"prompt_2": "(red:99) apple"}, "prompt_2", "weighs 'red' by 99"),
    ],
)
def test_a_problem_is_named_at_its_field(sdxl, session, changes, name, message):
    found = find_problems(request_of(**changes), sdxl.facts)
    assert list(found) == [name]
    assert message in found[name]
    assert find_problems(request_of(**changes), session.facts) == {}  # which reads none of them


def test_a_model_of_one_text_encoder_makes_its_image_and_says_what_it_does_not_take(session):
    assert not session.facts.is_sdxl
    *_, last = session.generate(request_of(**GIVEN))
    assert isinstance(last, Finished)
    assert "prompt_2" not in read_settings(last.entries[0].path)["call"]
    call = {"prompt": "a cat", **STATED}
    found, notes = request_from_settings(
        {"call": call}, request_of(), facts=session.facts, loras=[]
    )
    assert found.prompt_2 == ""
    (note,) = [note for note in notes if "not SDXL" in note]
    assert note.startswith("prompt 2, negative prompt 2, original size")
