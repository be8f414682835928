"""Prompts in a call: weights, long prompts and skipped layers act on the image as documented."""

import logging

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from fakes_pipeline import SIZE, tiny_components, tiny_pipeline

CALL = {"num_inference_steps": 3, "output_type": "np"}
LONG = "a red heart a green apple a yellow cat the blue sea the sky a table a face " * 3
SHORT = "a cat"


def test_weight_of_one_is_the_plain_prompt_and_others_are_not():
    pipe = tiny_pipeline()
    plain = pipe("red apple", seed=1, **CALL).images
    assert np.abs(pipe("(red:1.0) apple", seed=1, **CALL).images - plain).max() <= 1 / 255
    weighted = [pipe(f"(red:{w}) apple", seed=1, **CALL).images for w in (1.2, 1.9)]
    assert 0 < np.abs(weighted[0] - plain).mean() < np.abs(weighted[1] - plain).mean()


def test_long_prompt_is_truncated_with_a_warning_or_read_whole(caplog):
    pipe = tiny_pipeline()
    with caplog.at_level(logging.WARNING, logger="latentdiff"):
        cut = pipe(LONG, seed=1, **CALL).images
    assert "cut off" in caplog.text
    caplog.clear()
    whole = pipe(LONG, seed=1, long_prompts="chunks", **CALL).images
    assert not caplog.records
    assert not np.array_equal(cut, whole)
    assert np.array_equal(
        pipe(SHORT, seed=1, long_prompts="chunks", **CALL).images,
        pipe(SHORT, seed=1, **CALL).images,
    )


@pytest.mark.parametrize("negative_prompt", [None, LONG])
def test_long_and_short_prompts_do_not_change_each_other(negative_prompt):
    pipe = tiny_pipeline()
    call = CALL | {"long_prompts": "chunks", "negative_prompt": negative_prompt}
    together = pipe([SHORT, LONG], seed=[1, 2], **call).images
    for prompt, seed, image in ((SHORT, 1, together[0]), (LONG, 2, together[1])):
        assert np.abs(pipe(prompt, seed=seed, **call).images[0] - image).max() <= 1 / 255


def test_skipped_layers_equal_stock():
    stock = StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    text_encoder = stock.text_encoder
    if not hasattr(text_encoder, "text_model"):
        object.__setattr__(text_encoder, "text_model", text_encoder)  # where stock looks
    expected = stock(
        "a cat",
        clip_skip=1,
        generator=torch.Generator().manual_seed(1),
        height=SIZE,
        width=SIZE,
        **CALL,
    ).images
    pipe = tiny_pipeline()
    assert np.abs(pipe("a cat", seed=1, clip_skip=1, **CALL).images - expected).max() <= 1 / 255
    assert not np.array_equal(pipe("a cat", seed=1, **CALL).images, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"long_prompts": "all"}, "long_prompts must be one of truncate, chunks"),
        ({"clip_skip": 2}, r"clip_skip must be an int in 0\.\.1"),
        ({"clip_skip": 0.5}, "clip_skip"),
        ({"lora_scale": float("nan")}, "lora_scale"),
    ],
)
def test_bad_reading_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()("a cat", **arguments)


def test_pipeline_without_a_text_encoder_asks_for_prompt_embeds():
    pipe = tiny_pipeline(text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="prompt needs a text encoder"):
        pipe("a cat")
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        pipe(prompt_embeds=torch.zeros(1, 16, 16))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_images_per_prompt": 0},
        {"num_images_per_prompt": -1},
        {"num_images_per_prompt": 1.5},
        {"num_images_per_prompt": True},
        {"clip_skip": 99},
        {"lora_scale": float("nan")},
        {"negative_prompt": ["a", "b", "c"]},
    ],
)
def test_counts_are_checked_as_in_a_call(arguments):
    pipe, settings = tiny_pipeline(), {"do_classifier_free_guidance": True} | arguments
    with pytest.raises(ValueError, match=next(iter(arguments))):
        pipe.encode_prompt("a cat", "cpu", **({"num_images_per_prompt": 1} | settings))
