"""Nonsense is refused by name before any compute."""

import math

import numpy as np
import pytest
import torch
from fakes_pipeline import tiny_pipeline

NAN = float("nan")


@pytest.fixture(scope="module")
def pipe():
    """A pipeline whose networks must not be reached."""
    pipe = tiny_pipeline()
    for network in (pipe.unet, pipe.text_encoder, pipe.vae.decoder):
        network.forward = _unreachable
    return pipe


def _unreachable(*_, **__):
    raise AssertionError("a network ran before the arguments were checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", 3]}, r"prompt\[1\] must be a str, got int"),
        ({"prompt": ["a", None]}, r"prompt\[1\] must be a str, got None"),
        ({"prompt": 3}, "prompt must be a str or a list"),
        ({"prompt": "\ud800"}, "prompt is not valid Unicode"),
        ({"prompt": "(a:99)"}, "prompt weighs 'a' by 99"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts but there are 1"),
        ({"negative_prompt": 1}, "negative_prompt must be"),
        ({"height": 0}, "height must be a positive multiple of 4"),
        ({"height": -8}, "height"),
        ({"height": 30}, "height .* nearest is"),
        ({"width": 32.0}, "width .* got 32.0"),
        ({"width": True}, "width"),
        ({"width": "32"}, "width"),
        ({"height": 10**9}, "height"),
        ({"num_inference_steps": 0}, r"num_inference_steps must be an int in 1\.\.1000, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"guidance_scale": NAN}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": 10**400}, "guidance_scale"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
        ({"eta": -0.1}, "eta"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"seed": -1}, "seed must be an int in 0"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": [1, 2]}, "seed has 2 entries but 1 images"),
        ({"seed": ["1"]}, r"seed\[0\]"),
        ({"seed": 1, "generator": torch.Generator()}, "both seed and generator"),
        ({"generator": 5}, "generator must be"),
        ({"generator": [torch.Generator()] * 2}, "generator has 2 entries"),
        ({"generator": [3]}, r"generator\[0\]"),
        ({"latents": 3}, "latents must be a tensor"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents .*\(1, 4, 8, 8\).* got .*\(1, 4, 4, 4\)"),
        ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.float64)}, "latents .*float64"),
        ({"latents": torch.full((1, 4, 8, 8), NAN)}, "latents holds NaN"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
        ({"output_type": None}, "output_type"),
        ({"output_type": []}, "output_type"),
        ({"output_type": np.zeros(3)}, "output_type"),
        ({"long_prompts": torch.zeros(2)}, "long_prompts must be one of truncate, chunks"),
        ({"return_dict": "yes"}, "return_dict"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be callable"),
        ({"callback_on_step_end_tensor_inputs": ["nonsense"]}, "nonsense"),
        ({"callback_on_step_end_tensor_inputs": [np.zeros(3)]}, "tensor_inputs knows latents"),
        ({"callback_on_step_end_tensor_inputs": 3}, "callback_on_step_end_tensor_inputs"),
        ({"prompt_embeds": torch.zeros(1, 16, 16)}, "prompt .*prompt_embeds, got both"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 9)}, "prompt_embeds must have shape"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 16, 16)}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": [1]}, "prompt_embeds must be a tensor"),
        ({"negative_prompt_embeds": torch.zeros(1, 16, 16)}, "needs prompt_embeds"),
        (
            {
                "prompt": None,
                "prompt_embeds": torch.zeros(1, 16, 16),
                "negative_prompt_embeds": torch.zeros(1, 8, 16),
            },
            "negative_prompt_embeds must have shape",
        ),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 16, 16)},
            "both negative_prompt and negative_prompt_embeds",
        ),
    ],
)
def test_bad_argument_is_named_before_any_compute(pipe, arguments, message):
    if arguments:
        arguments = {"prompt": "a cat"} | arguments
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_unknown_keyword_is_refused(pipe):
    with pytest.raises(TypeError, match="guidence_scale"):
        pipe("a cat", guidence_scale=3)


def test_numpy_numbers_are_numbers():
    pipe = tiny_pipeline()
    result = pipe(
        "a cat",
        num_inference_steps=np.int64(2),
        guidance_scale=np.float32(3),
        seed=np.int64(3),
        height=np.int32(32),
    )
    assert result.seeds == [3]
