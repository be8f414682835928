"""Requests: checked field by field, and read from PNG files of ours and of A1111."""

from dataclasses import replace

import pytest
from fakes_app import request_of
from PIL import Image, PngImagePlugin

from latentdiff.app.image_request import (
    IMAGE,
    INPAINT,
    TEXT,
    find_problems,
    request_from_settings,
)
from latentdiff.app.library import NO_LORA
from latentdiff.app.model_facts import OWN_SCHEDULER
from latentdiff.pipeline.png_metadata import read_settings

PHOTO = Image.new("RGB", (64, 32))


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"prompt": "  "}, "prompt", "say what to draw"),
        ({"prompt": "(red:99) apple"}, "prompt", "weighs 'red' by 99"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt", "2001 characters"),
        ({"seed": "-1"}, "seed", "whole number"),
        ({"seed": "one"}, "seed", "'one'"),
        ({"seed": "²"}, "seed", "whole number"),
        ({"seed": str(2**63)}, "seed", "whole number"),
        ({"width": 30}, "width", "multiple of 4"),
        ({"height": 68}, "height", "up to 64"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt", "1 to 4"),
        ({"guidance_scale": 31.0}, "guidance_scale", "0 to 30"),
        ({"clip_skip": 2}, "clip_skip", "0 to 1"),
        ({"kind": IMAGE}, "image", "upload an image"),
        ({"kind": INPAINT, "image": PHOTO}, "image", "paint over"),
    ],
)
def test_a_problem_is_named_at_its_field(session, changes, name, message):
    assert find_problems(request_of(), session.facts) == {}
    found = find_problems(request_of(**changes), session.facts)
    assert list(found) == [name]
    assert message in found[name]


def test_brackets_are_text_where_words_are_not_weighed(session):
    request = request_of(prompt="(red:99) apple", prompt_weighting=False)
    assert find_problems(request, session.facts) == {}


def test_a_file_s_settings_give_its_request_back(session):
    asked = request_of(
        prompt="a red heart",
        negative_prompt="a cat",
        seed="7",
        width=40,
        guidance_scale=4.5,
        guidance_rescale=0.3,
        scheduler="dpm++2m-karras",
        clip_skip=1,
        long_prompts="chunks",
        prompt_weighting=False,
    )
    *_, finished = session.generate(asked)
    settings = read_settings(finished.entries[0].path)
    now = request_of(kind=IMAGE, image=PHOTO, prompt="other", seed="", clip_skip=0)
    found, notes = request_from_settings(settings, now, facts=session.facts, loras=[])
    assert (replace(found, image=None), notes) == (asked, [])


def test_settings_of_a1111_are_taken_as_far_as_this_model_goes(session, tmp_path):
    text = (
        "a red heart <lora:ink:0.6>\nNegative prompt: a cat\n"
        "Steps: 9, Sampler: Euler a, CFG scale: 5, Seed: 3, Size: 512x512, Clip skip: 2"
    )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    PHOTO.save(tmp_path / "a1111.png", pnginfo=chunks)
    settings, given = read_settings(tmp_path / "a1111.png"), request_of()
    found, notes = request_from_settings(settings, given, facts=session.facts, loras=["ink"])
    assert found == request_of(
        prompt="a red heart",
        negative_prompt="a cat",
        seed="3",
        num_inference_steps=9,
        guidance_scale=5.0,
        scheduler="euler-a",
        clip_skip=1,
        lora="ink",
        lora_scale=0.6,
    )
    assert notes == [
        "width: expected a multiple of 4 up to 64, got 512",
        "height: expected a multiple of 4 up to 64, got 512",
    ]
    _, notes = request_from_settings(settings, given, facts=session.facts, loras=[])
    assert "LoRA ink is not in the list" in notes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"call": 3, "scheduler": 4, "loras": 5},
        {"call": {"prompt": 1, "seed": [2], "width": "wide", "num_inference_steps": None}},
        {"call": {"long_prompts": "maybe", "prompt_weighting": "yes", "guidance_scale": True}},
    ],
)
def test_settings_that_are_none_leave_the_page_as_it_is(session, settings):
    given = request_of(prompt="a cat", seed="")
    found, _ = request_from_settings(settings, given, facts=session.facts, loras=[])
    kept = ("prompt", "width", "num_inference_steps", "guidance_scale", "long_prompts")
    assert all(getattr(found, name) == getattr(given, name) for name in (*kept, "seed"))
    assert (found.kind, found.scheduler, found.lora) == (TEXT, OWN_SCHEDULER, NO_LORA)
    assert found.prompt_weighting is True


def test_a_scheduler_and_an_image_that_are_not_there_are_named(session):
    settings = {"call": {"strength": 0.5}, "scheduler": {"class": "Odd"}, "inputs": {"image": "1"}}
    _, notes = request_from_settings(settings, request_of(), facts=session.facts, loras=[])
    assert notes == [
        "scheduler Odd is not available for this model; its own is taken",
        "the image it was made from is not in the file",
    ]
