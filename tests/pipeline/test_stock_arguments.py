"""What users of stock diffusers' pipelines rely on: their arguments, and swapped components."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from fakes_pipeline import SIZE, ddim, lora_weights, tiny_components, tiny_pipeline
from test_image_inputs import photo

STEP = 1 / 255
CALL = {"prompt": "a cat", "output_type": "np", "seed": 1}
SIGMAS = [10.0, 4.0, 1.5, 0.4, 0.0]


def stock(cls=StableDiffusionPipeline, **changes):
    pipe = cls(**tiny_components(**changes), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize(
    ("scheduler", "spacing"),
    [
        (LCMScheduler, {"timesteps": [999, 499]}),
        (EulerDiscreteScheduler, {"timesteps": torch.tensor([900, 500, 20])}),
        (EulerDiscreteScheduler, {"sigmas": SIGMAS}),
        (HeunDiscreteScheduler, {"timesteps": [900, 500, 20]}),
    ],
)
def test_timesteps_and_sigmas_are_stock_s_and_make_the_image_again(scheduler, spacing):
    parts = [{"scheduler": scheduler.from_config(ddim().config)} for _ in range(2)]
    given = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in spacing.items()}
    size = {"height": SIZE, "width": SIZE}
    call = {"prompt": "a cat", "output_type": "np", "generator": generator()}
    expected = stock(**parts[0])(**call, **given, **size).images
    pipe = tiny_pipeline(**parts[1])
    result = pipe(**CALL, num_inference_steps=None, **spacing)
    assert np.abs(result.images - expected).max() <= STEP
    settings = result.settings[0]["call"]
    assert settings["num_inference_steps"] == (
        4 if "sigmas" in spacing else len(given["timesteps"])
    )
    again = pipe(**settings, output_type="np").images
    assert np.array_equal(again, result.images)


def test_strength_keeps_the_last_of_the_given_timesteps():
    taken = []
    call = CALL | {"image": photo(), "strength": 0.5, "output_type": "latent"}
    scheduler = HeunDiscreteScheduler.from_config(ddim().config)
    tiny_pipeline(scheduler=scheduler)(
        **call,
        timesteps=[900, 500, 300, 20],
        callback_on_step_end=lambda p, i, t, x: taken.append(int(t)),
    )
    assert taken == [300, 20, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": []}, "timesteps must be a list"),
        ({"timesteps": 5}, "timesteps must be a list"),
        ({"timesteps": [5, 9]}, "timesteps must descend"),
        ({"timesteps": [9.5, 3]}, "timesteps must be whole"),
        ({"timesteps": [1000, 3]}, r"timesteps\[0\] must lie in 0\.\.999"),
        ({"timesteps": [9, None]}, r"timesteps\[1\] must be a number"),
        ({"timesteps": [9], "sigmas": SIGMAS}, "both timesteps and sigmas"),
        ({"timesteps": [9], "image": photo(), "strength": 0.5}, r"timesteps=\[9\] leaves no step"),
        ({"sigmas": [1.0]}, r"sigmas=\[1.0\] leaves no step"),
        ({"sigmas": [1.0, float("nan")]}, r"sigmas\[1\] must lie"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "cross_attention_kwargs may hold the scale"),
        ({"cross_attention_kwargs": {"scale": "x"}}, r"cross_attention_kwargs\[.scale.\] must"),
        ({"cross_attention_kwargs": 0.5}, "cross_attention_kwargs may hold"),
        ({"cross_attention_kwargs": {"scale": 0.5}, "lora_scale": 1}, "got lora_scale=1 and cross"),
        ({"ip_adapter_image": photo()}, "ip_adapter_image is not supported here; IP-Adapters"),
        ({"ip_adapter_image_embeds": [torch.zeros(1)]}, "ip_adapter_image_embeds is not supported"),
        ({"image": torch.full((3, 8, 8), -1.5)}, r"image must lie in \[0, 1\] or \[-1, 1\]"),
        ({"image": torch.linspace(-0.01, 1, 192).reshape(3, 8, 8)}, "image .*fits both: clamp"),
        ({"image": np.linspace(-0.01, 1, 192).reshape(8, 8, 3)}, "image .*fits both: clamp"),
        (
            {"image": [torch.ones(3, 8, 8), -torch.ones(3, 8, 8)]},
            "image must hold images of one range",
        ),
        (
            {"image": photo(), "mask_image": -torch.ones(8, 8)},
            r"mask_image must lie in \[0, 1\], got",
        ),
    ],
)
def test_what_fits_nothing_is_named(arguments, message):
    pipe = tiny_pipeline(scheduler=EulerDiscreteScheduler.from_config(ddim().config))
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **arguments)


def test_scheduler_that_takes_no_timesteps_is_named():
    with pytest.raises(ValueError, match="timesteps cannot be set on a DDIMScheduler"):
        tiny_pipeline(scheduler=ddim())("a cat", timesteps=[9, 3])


def test_misspelt_argument_gets_the_nearest_name_and_unused_stock_ones_may_be_none():
    pipe = tiny_pipeline()
    with pytest.raises(TypeError, match="no argument guidence_scale"):
        pipe("a cat", guidence_scale=3)
    pipe("a cat", num_inference_steps=1, ip_adapter_image=None, cross_attention_kwargs=None)


def test_cross_attention_scale_is_lora_scale():
    pipe = tiny_pipeline()
    pipe.load_lora_weights(lora_weights())
    call = CALL | {"num_inference_steps": 2}
    scaled = pipe(**call, cross_attention_kwargs={"scale": 0.3}).images
    assert np.array_equal(scaled, pipe(**call, lora_scale=0.3).images)
    assert not np.array_equal(scaled, pipe(**call).images)


def test_image_in_minus_one_to_one_is_the_image():
    pipe = tiny_pipeline()
    call = CALL | {"strength": 0.7, "num_inference_steps": 4}
    unit = np.asarray(photo(1)).astype(np.float32) / 255
    tensor = torch.from_numpy(unit).permute(2, 0, 1)
    expected = pipe(**call, image=tensor).images
    for image in (2 * tensor - 1, 2 * unit - 1, [2 * tensor - 1], (2 * tensor - 1).double()):
        np.testing.assert_allclose(pipe(**call, image=image).images, expected, atol=1e-5)
    other = stock(StableDiffusionImg2ImgPipeline)
    theirs = call | {"image": tensor[None] * 2 - 1, "generator": generator()}
    theirs.pop("seed")
    assert np.abs(other(**theirs).images - expected).max() <= STEP


def test_swapped_vae_sets_size_channels_and_image_processor():
    pipe = tiny_pipeline()
    call = CALL | {"num_inference_steps": 1}
    assert pipe(**call).images.shape == (1, 32, 32, 3)
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(4,) * 2,
        decoder_block_out_channels=(4,) * 2,
        num_encoder_blocks=(1,) * 2,
        num_decoder_blocks=(1,) * 2,
    )
    assert (pipe.vae_scale_factor, pipe.image_processor.config.vae_scale_factor) == (2, 2)
    assert pipe(**call).images.shape == (1, 16, 16, 3)
    assert pipe(**call, image=photo(0, (30, 22)), strength=1.0).images.shape == (1, 22, 30, 3)
    assert pipe.image_processor.preprocess(photo()).shape == (1, 3, SIZE, SIZE)
    pipe.vae = AutoencoderKL(latent_channels=8, norm_num_groups=2, block_out_channels=(4,))
    with pytest.raises(ValueError, match=r"the U-Net takes 4 channels .*VAE's latents have 8"):
        pipe(**call)
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="the VAE is a Linear"):
        pipe(**call)
