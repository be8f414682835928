"""Random arguments of a call: a valid image or an error that names an argument, nothing else.

    python tests/fakes/fuzz_pipeline.py 10000 [FIRST]

The tests run a few hundred of them. FIRST continues where another run stopped.
"""

import functools
import logging
import math
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
from fakes_pipeline import tiny_pipeline, tiny_unet
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.pipeline.schedulers import scheduler_names

DEADLINE_MS = 20_000
ROUND = 500
SIZES = st.sampled_from([4, 8, 16, 28, 32])
NUMBERS = [-1, 0, 1, 2, 3, 0.5, 2.5, 1e-30, 1e30, 10**9, 2**63, 10**400]
NUMBERS += [math.nan, math.inf, -math.inf, np.float32(0.5), np.int64(2)]
JUNK: list[Any] = [*NUMBERS, None, True, "", "x", "\ud800", b"x", [], {}, (), [None], object()]
JUNK += [torch.zeros(0), torch.zeros(2), torch.full((1, 4, 8, 8), math.nan), np.zeros(3)]
JUNK += [
    ["a", 1],
    [1, 2],
    [math.nan, 1],
    lambda *_: None,
    torch.Generator(),
    Image.new("L", (1, 1)),
]


def noise_image(size: int) -> Image.Image:
    return Image.effect_noise((size, size), 60).convert("RGB")


def changed_latents(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.5} if "latents" in tensors else {}


def dark(z0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return -z0.mean((1, 2, 3))


def shapeless(z0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return z0.mean()


SENSE: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.one_of(
        st.text(max_size=40),
        st.lists(st.text(max_size=20), min_size=1, max_size=2),
        st.sampled_from(["(red:1.4) apple", "((a:0)", "a cat " * 40, "(b:-1)", "\\(a\\:2)"]),
    ),
    "negative_prompt": st.text(max_size=40),
    "height": SIZES,
    "width": SIZES,
    "num_inference_steps": st.integers(1, 4),
    "timesteps": st.one_of(
        st.lists(st.integers(0, 999), min_size=1, max_size=4).map(lambda t: sorted(t)[::-1]),
        st.sampled_from([[999, 499], torch.tensor([900, 20]), [20, 900], [9.5], [1000, 1]]),
    ),
    "sigmas": st.sampled_from([[10.0, 1.0, 0.0], [14.6, 2.7, 0.4, 0.0], np.ones(3), [5.0]]),
    "guidance_scale": st.floats(0, 30),
    "guidance_rescale": st.floats(0, 1),
    "guidance_interval": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "score_fn": st.sampled_from([dark, dark, shapeless]),
    "score_scale": st.floats(0, 100),
    "num_images_per_prompt": st.integers(1, 2),
    "seed": st.one_of(st.integers(0, 2**63 - 3), st.lists(st.integers(0, 9), max_size=3)),
    "generator": st.builds(torch.Generator),
    "eta": st.floats(0, 1),
    "latents": st.sampled_from([torch.zeros(1, 4, 8, 8), torch.ones(2, 4, 8, 8)]),
    "prompt_embeds": st.sampled_from([torch.zeros(1, 16, 16), torch.ones(2, 8, 16)]),
    "negative_prompt_embeds": st.sampled_from([torch.zeros(1, 16, 16), torch.ones(2, 8, 16)]),
    "image": st.sampled_from(
        [
            *(noise_image(32), noise_image(9), [noise_image(16)] * 2),
            *(torch.rand(3, 8, 8), 2 * torch.rand(3, 8, 8) - 1, torch.rand(3, 8, 8) - 0.01),
        ]
    ),
    "mask_image": st.sampled_from([noise_image(32).convert("L"), torch.ones(8, 8), np.eye(9)]),
    "strength": st.floats(0, 1),
    "padding_mask_crop": st.integers(0, 40),
    "keep_unmasked": st.booleans(),
    "long_prompts": st.sampled_from(["truncate", "cut", "chunks"]),
    "clip_skip": st.integers(0, 1),
    "lora_scale": st.floats(-1, 2),
    "cross_attention_kwargs": st.sampled_from([{"scale": 0.5}, {"scale": "x"}, {}, {"y": 1}]),
    "ip_adapter_image": st.sampled_from([None, None, noise_image(8)]),
    "output_type": st.sampled_from(["pil", "np", "pt", "latent"]),
    "return_dict": st.booleans(),
    "callback_on_step_end": st.just(changed_latents),
    "callback_on_step_end_tensor_inputs": st.lists(
        st.sampled_from(["latents", "prompt_embeds", "predicted_z0", "cfg_delta"])
    ),
}
RIVALS = [
    ("prompt", "prompt_embeds", "negative_prompt_embeds"),
    ("seed", "generator"),
    ("", "latents"),
    ("num_inference_steps", "timesteps", "sigmas"),
    ("lora_scale", "cross_attention_kwargs"),
]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Return a call's arguments: mostly sense, now and then junk."""
    names = draw(st.lists(st.sampled_from(sorted(SENSE)), max_size=8, unique=True))
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2}
    for name in names:
        call[name] = draw(SENSE[name])
    if draw(st.booleans()):  # what goes together
        for group in RIVALS:
            for name in group[1:]:
                call.pop(name, None)
        if "image" not in call:
            call.pop("mask_image", None), call.pop("strength", None)
        if "mask_image" not in call:
            call.pop("padding_mask_crop", None), call.pop("keep_unmasked", None)
    if draw(st.integers(0, 3)) == 0:
        call[draw(st.sampled_from(sorted(SENSE)))] = draw(st.sampled_from(JUNK))
    if draw(st.integers(0, 30)) == 0:
        call["nonsense"] = 1
    return call


@functools.cache
def pipeline(num_channels: int) -> Any:
    return tiny_pipeline(unet=tiny_unet(in_channels=num_channels))


def run(call: dict[str, Any], *, scheduler: str, num_channels: int) -> bool:
    """Make one call; return whether it gave an image. AssertionError for any other outcome."""
    pipe = pipeline(num_channels)
    pipe.set_scheduler(scheduler)
    try:
        result = pipe(**call)
    except (ValueError, TypeError) as error:
        message = str(error)
        if not any(name in message for name in [*SENSE, "nonsense"]):
            raise AssertionError(f"{error!r} names no argument of {call}") from error
        return False
    images = result[0]
    if isinstance(images, list):
        assert all(isinstance(image, Image.Image) for image in images), call
        images = np.stack([np.asarray(image) for image in images])
    assert len(images) > 0, call
    assert bool(torch.isfinite(torch.as_tensor(images)).all()), call
    return True


def fuzz(num_examples: int, *, key: int = 0) -> dict[str, int]:
    """Run random calls, others for each key; return the numbers of images and of refusals."""
    counts = {"made": 0, "refused": 0}

    @seed(key)
    @settings(
        max_examples=num_examples,
        deadline=DEADLINE_MS,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(calls(), st.sampled_from(scheduler_names()), st.sampled_from([4, 4, 4, 9]))
    def one(call: dict[str, Any], scheduler: str, num_channels: int) -> None:
        is_made = run(call, scheduler=scheduler, num_channels=num_channels)
        counts["made" if is_made else "refused"] += 1

    one()
    return counts


if __name__ == "__main__":
    started = time.monotonic()
    logging.disable(logging.WARNING)
    numbers = [int(argument) for argument in sys.argv[1:]]
    wanted, first = (*numbers, 10_000, 0)[:2] if len(numbers) != 1 else (numbers[0], 0)
    total = Counter[str]()
    while total.total() < wanted:
        left = min(ROUND, wanted - total.total())
        total += Counter(fuzz(left, key=first + total.total()))
        print(f"{dict(total)} in {time.monotonic() - started:.0f} s", flush=True)
