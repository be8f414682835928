"""Samplers by name, few steps, and guidance on a part of the chain."""

import diffusers
import numpy as np
import pytest
import torch
from fakes_pipeline import ddim, tiny_pipeline, tiny_unet

from latentdiff.pipeline.schedulers import make_scheduler, scheduler_names


@pytest.mark.parametrize("name", scheduler_names())
def test_every_scheduler_makes_images_in_few_steps_and_by_image(name):
    pipe = tiny_pipeline()
    pipe.set_scheduler(name)
    for steps in (1, 3):
        call = {"num_inference_steps": steps, "output_type": "np", "prompt": "a cat"}
        pair = pipe(**call, seed=[1, 2], num_images_per_prompt=2).images
        assert np.isfinite(pair).all()
        assert np.abs(pipe(**call, seed=2).images[0] - pair[1]).max() <= 1 / 255


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler"),
        ("dpm++2m-karras", "DPMSolverMultistepScheduler"),
        ("Euler a", "EulerAncestralDiscreteScheduler"),
        ("UniPC", "UniPCMultistepScheduler"),
        ("euler_a", "EulerAncestralDiscreteScheduler"),
    ],
)
def test_names_are_read_as_people_write_them(name, cls):
    scheduler = make_scheduler(name, trained=ddim())
    assert type(scheduler).__name__ == cls
    assert bool(scheduler.config.get("use_karras_sigmas")) == ("arras" in name)


def test_scheduler_keeps_what_training_fixed_and_nothing_of_the_last_scheduler():
    trained = ddim(prediction_type="v_prediction", beta_end=0.02, timestep_spacing="trailing")
    karras = make_scheduler("dpm++2m-sde-karras", trained=trained)
    back = make_scheduler("dpm++2m", trained=karras)
    expected = diffusers.DPMSolverMultistepScheduler.from_config(trained.config)
    assert torch.equal(back.alphas_cumprod, trained.alphas_cumprod)
    for key in ("prediction_type", "timestep_spacing", "algorithm_type", "use_karras_sigmas"):
        assert back.config[key] == expected.config[key]
    assert make_scheduler("ddpm", trained=trained).config.clip_sample is False


@pytest.mark.parametrize("name", ["dpmpp", "ddmi", "", None, 3, "ddim-karras"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"no scheduler .*known: ddpm, ddim"):
        make_scheduler(name, trained=ddim())


def test_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'dpm\+\+2m-karras'"):
        make_scheduler("dpm++2m-karas", trained=ddim())


def test_zero_terminal_snr_needs_a_scheduler_that_can_start_from_noise():
    trained = ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"heun.* cannot start from pure noise"):
        make_scheduler("heun", trained=trained)
    euler = make_scheduler("euler", trained=trained)
    assert euler.config.rescale_betas_zero_snr


def test_learned_variance_stays_with_ddpm():
    trained = diffusers.DDPMScheduler(variance_type="learned_range")
    assert make_scheduler("ddpm", trained=trained).config.variance_type == "learned_range"
    pipe = tiny_pipeline(unet=tiny_unet(out_channels=8), scheduler=trained)
    pipe.set_scheduler("ddim")
    with pytest.raises(ValueError, match=r"scheduler .*learned variance"):
        pipe("a cat", num_inference_steps=2)


def test_whole_interval_is_plain_guidance_and_none_of_it_is_no_guidance():
    pipe = tiny_pipeline()
    call = {"prompt": "a cat", "seed": 1, "num_inference_steps": 5, "output_type": "np"}
    plain = pipe(**call).images
    assert np.array_equal(pipe(**call, guidance_interval=(0, 1)).images, plain)
    part = pipe(**call, guidance_interval=(0.3, 0.6)).images
    assert not np.array_equal(part, plain)
    tail = pipe(**call, guidance_interval=(0.9999, 1)).images
    assert np.array_equal(tail, pipe(**call, guidance_scale=1).images)


def test_guidance_runs_two_predictions_inside_its_interval_only():
    pipe = tiny_pipeline()
    sizes = []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda sample, *rest, **named: (
        sizes.append(len(sample)) or forward(sample, *rest, **named)
    )
    pipe("a cat", seed=1, num_inference_steps=10, guidance_interval=(0.25, 0.55))
    assert sizes == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("part", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1), (0, 1.5), (0.1,), 0.5, "ab"])
def test_bad_interval_is_named(part):
    with pytest.raises(ValueError, match="guidance_interval"):
        tiny_pipeline()("a cat", guidance_interval=part)
