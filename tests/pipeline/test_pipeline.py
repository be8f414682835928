"""Text to image: what LatentDiffPipeline promises of a call."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from fakes_pipeline import (
    SIZE,
    ddim,
    tiny_components,
    tiny_pipeline,
    tiny_safety_checker,
    tiny_unet,
)
from PIL import Image

from latentdiff.pipeline import LatentDiffPipeline

STEP = 1 / 255
PROMPTS = ["a red heart", "a green apple"]
SCHEDULERS = [
    ("DDPMScheduler", {}),
    ("DDIMScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("LCMScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
]


def scheduler(name, settings):
    return getattr(diffusers, name).from_config(ddim().config, **settings)


def stock_pipeline(**changes):
    pipe = StableDiffusionPipeline(**tiny_components(**changes), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_image_equals_stock_for_the_same_latents(name, settings):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "np"}
    stock = stock_pipeline(scheduler=scheduler(name, settings))
    expected = stock(
        PROMPTS, latents=latents, generator=generators(1, 2), height=SIZE, width=SIZE, **arguments
    ).images
    ours = tiny_pipeline(scheduler=scheduler(name, settings))
    images = ours(PROMPTS, latents=latents, generator=generators(1, 2), **arguments).images
    assert expected.std() > 0.05
    assert np.abs(images - expected).max() <= STEP


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_equal_stock(prediction_type):
    arguments = {"num_inference_steps": 4, "guidance_rescale": 0.7, "output_type": "np"}
    chain = {"prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    expected = stock_pipeline(scheduler=ddim(**chain))(
        PROMPTS, generator=generators(1, 2), height=SIZE, width=SIZE, **arguments
    ).images
    images = tiny_pipeline(scheduler=ddim(**chain))(PROMPTS, seed=1, **arguments).images
    assert np.abs(images - expected).max() <= STEP


def test_distilled_unet_reads_the_guidance_scale_as_stock_does():
    parts = {"unet": tiny_unet(time_cond_proj_dim=8), "scheduler": scheduler("LCMScheduler", {})}
    arguments = {"num_inference_steps": 3, "guidance_scale": 8.0, "output_type": "np"}
    expected = stock_pipeline(**parts)(
        "a cat", generator=generators(1), height=SIZE, width=SIZE, **arguments
    ).images
    assert np.abs(tiny_pipeline(**parts)("a cat", seed=1, **arguments).images - expected).max() == 0


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_image_of_a_batch_equals_the_image_made_alone(name, settings):
    pipe = tiny_pipeline(scheduler=scheduler(name, settings))
    prompts = ["a red heart", "blue sea, sky", "a cat"]
    arguments = {"num_inference_steps": 4, "output_type": "np", "negative_prompt": "a table"}
    together = pipe(prompts, seed=[5, 99, 7], **arguments).images
    for prompt, seed, image in zip(prompts, [5, 99, 7], together, strict=True):
        alone = pipe(prompt, seed=seed, **arguments).images[0]
        assert np.abs(alone - image).max() <= STEP


def test_one_seed_counts_up_over_images():
    pipe = tiny_pipeline()
    result = pipe(PROMPTS, seed=7, num_images_per_prompt=2, num_inference_steps=2, output_type="np")
    assert result.seeds == [7, 8, 9, 10]
    alone = pipe(PROMPTS[1], seed=9, num_inference_steps=2, output_type="np")
    assert np.abs(alone.images[0] - result.images[2]).max() <= STEP


@pytest.mark.parametrize("num_images_per_prompt", [1, 3])
@pytest.mark.parametrize("prompt", ["a cat", ["a cat"], PROMPTS])
def test_number_of_images_is_prompts_times_images(prompt, num_images_per_prompt):
    count = num_images_per_prompt * (1 if isinstance(prompt, str) else len(prompt))
    result = tiny_pipeline()(
        prompt, num_images_per_prompt=num_images_per_prompt, num_inference_steps=1
    )
    assert len(result.images) == len(result.seeds) == len(result.settings) == count


def test_random_seeds_are_returned_and_make_the_image_again():
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    first = pipe("a cat", num_inference_steps=2, output_type="np")
    again = pipe("a cat", seed=first.seeds, num_inference_steps=2, output_type="np")
    torch.manual_seed(0)
    same = pipe("a cat", num_inference_steps=2, output_type="np")
    assert same.seeds == first.seeds
    assert np.array_equal(first.images, again.images)


def test_generators_are_used_as_stock_uses_them():
    pipe = tiny_pipeline()
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    by_seed = pipe(PROMPTS, seed=[1, 2], **arguments)
    by_generator = pipe(PROMPTS, generator=generators(1, 2), **arguments)
    assert by_generator.seeds is None
    assert np.array_equal(by_seed.images, by_generator.images)


def test_output_types_hold_the_same_image():
    pipe = tiny_pipeline()
    call = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2}
    array = pipe(**call, output_type="np").images
    tensor = pipe(**call, output_type="pt").images
    image = pipe(**call).images[0]
    latents = pipe(**call, output_type="latent").images
    assert image.size == (SIZE, SIZE)
    assert latents.shape == (1, 4, 8, 8)
    assert np.abs(tensor.permute(0, 2, 3, 1).numpy() - array).max() < 1e-6
    assert np.abs(np.asarray(image) / 255 - array[0]).max() <= STEP


def test_tuple_holds_what_the_object_holds():
    pipe = tiny_pipeline()
    call = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2, "output_type": "np"}
    images, flagged = pipe(**call, return_dict=False)
    assert flagged is None
    assert np.array_equal(images, pipe(**call).images)
    assert np.array_equal(images, pipe(**call)[0])


def test_guidance_of_one_runs_without_the_negative_prompt():
    pipe = tiny_pipeline()
    call = {"prompt": "a cat", "seed": 1, "num_inference_steps": 3, "output_type": "np"}
    plain = pipe(**call, guidance_scale=1.0).images
    assert pipe.guidance_scale == 1.0
    assert not pipe.do_classifier_free_guidance
    assert np.array_equal(plain, pipe(**call, guidance_scale=1, negative_prompt="sea").images)
    assert np.abs(plain - pipe(**call, guidance_scale=7.5).images).max() > STEP


def test_negative_prompt_of_one_text_serves_every_prompt():
    pipe = tiny_pipeline()
    call = {"prompt": PROMPTS, "seed": 1, "num_inference_steps": 2, "output_type": "np"}
    one = pipe(**call, negative_prompt="sea").images
    assert np.array_equal(one, pipe(**call, negative_prompt=["sea", "sea"]).images)
    assert not np.array_equal(one, pipe(**call).images)


def test_sizes_other_than_the_trained_one():
    pipe = tiny_pipeline()
    image = pipe("a cat", height=20, width=44, num_inference_steps=2, seed=1).images[0]
    assert image.size == (44, 20)


def test_a_size_far_beyond_the_trained_one_warns_once_with_one_that_fits(caplog):
    pipe = tiny_pipeline()
    trained = pipe.unet.config.sample_size * pipe.vae_scale_factor
    wide = {"height": trained, "width": 4 * trained, "num_inference_steps": 1, "seed": 1}
    for _ in range(2):
        pipe("a cat", **wide)
    said = [one for one in caplog.messages if "what this model was trained at" in one]
    assert len(said) == 1
    assert f"height={trained // 2}, width={2 * trained}" in said[0]
    caplog.clear()
    pipe("a cat", height=trained, width=trained + 12, num_inference_steps=1, seed=1)
    given = Image.new("RGB", (2 * trained, 2 * trained))
    pipe("a cat", image=given, strength=0.5, num_inference_steps=2, seed=1)
    assert not caplog.messages


def test_prompt_embeds_stand_for_the_prompt():
    pipe = tiny_pipeline()
    call = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}
    states, negative = pipe.encode_prompt("a cat", torch.device("cpu"), 1, True, "sea")
    assert states.shape == negative.shape == (1, 16, 16)
    by_states = pipe(prompt_embeds=states, negative_prompt_embeds=negative, **call).images
    assert np.array_equal(by_states, pipe("a cat", negative_prompt="sea", **call).images)


def test_encode_prompt_needs_the_text_encoder_alone():
    parts = tiny_components()
    alone = LatentDiffPipeline(**parts | {"unet": None, "vae": None, "scheduler": None})
    states, negative = alone.encode_prompt(PROMPTS, torch.device("cpu"), 2, True)
    assert states.shape == negative.shape == (4, 16, 16)
    again, _ = alone.encode_prompt(None, torch.device("cpu"), 1, False, prompt_embeds=states)
    assert torch.equal(again, states)
    rest = tiny_pipeline(text_encoder=None, tokenizer=None)
    call = {"seed": 1, "num_inference_steps": 2, "num_images_per_prompt": 1, "output_type": "np"}
    result = rest(prompt_embeds=states, negative_prompt_embeds=negative, **call)
    assert len(result.images) == 4


def test_callback_sees_and_changes_the_tensors():
    pipe = tiny_pipeline()
    seen = []

    def look(pipe, i, t, tensors):
        seen.append((i, int(t), {name: tuple(value.shape) for name, value in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = list(pipe._callback_tensor_inputs)
    result = pipe(
        "a cat",
        num_inference_steps=3,
        seed=1,
        output_type="latent",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=names,
    )
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert pipe.num_timesteps == 3
    assert seen[0][2] == {
        "latents": (1, 4, 8, 8),
        "prompt_embeds": (2, 16, 16),
        "negative_prompt_embeds": (1, 16, 16),
        "predicted_z0": (1, 4, 8, 8),
        "cfg_delta": (1, 4, 8, 8),
    }
    assert not result.images.any()


def test_last_predicted_z0_of_ddim_is_the_result():
    pipe = tiny_pipeline(scheduler=ddim(set_alpha_to_one=True, steps_offset=0))
    last = {}
    result = pipe(
        "a cat",
        num_inference_steps=4,
        seed=1,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: last.update(tensors),
        callback_on_step_end_tensor_inputs=["predicted_z0"],
    )
    torch.testing.assert_close(last["predicted_z0"], result.images, atol=1e-4, rtol=1e-4)


def test_callback_can_end_guidance_as_in_stock():
    def cut(pipe, i, t, tensors):
        if i == 0:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    call = {
        "prompt": "a cat",
        "num_inference_steps": 3,
        "output_type": "np",
        "generator": generators(1)[0],
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    expected = stock_pipeline()(**call, height=SIZE, width=SIZE).images
    images = tiny_pipeline()(**call | {"generator": generators(1)[0]}).images
    assert np.abs(images - expected).max() <= STEP


def test_callback_can_replace_the_negative_prompt():
    pipe = tiny_pipeline()
    _, other = pipe.encode_prompt("", torch.device("cpu"), 1, True, "sea")
    call = {"prompt": "a cat", "num_inference_steps": 3, "seed": 1, "output_type": "np"}
    changed = pipe(
        **call,
        callback_on_step_end=lambda *_: {"negative_prompt_embeds": other},
        callback_on_step_end_tensor_inputs=["negative_prompt_embeds"],
    ).images
    assert not np.array_equal(changed, pipe(**call).images)


def test_callback_can_stop_the_chain():
    pipe = tiny_pipeline()
    steps = []

    def stop(pipe, i, t, tensors):
        steps.append(i)
        pipe._interrupt = True

    pipe("a cat", num_inference_steps=5, seed=1, callback_on_step_end=stop)
    assert steps == [0]
    assert pipe.interrupt


def test_saved_folder_opens_in_stock_and_gives_the_same_image(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["requires_safety_checker"] is False
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is StableDiffusionPipeline
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "np"}
    expected = stock("a cat", generator=generators(4)[0], height=SIZE, width=SIZE, **call).images
    ours = LatentDiffPipeline.from_pretrained(tmp_path)
    assert type(ours) is LatentDiffPipeline
    assert np.abs(ours("a cat", seed=4, **call).images - expected).max() <= STEP


def test_learned_variance_is_not_guided():
    unet = tiny_unet(out_channels=8)
    chain = scheduler("DDPMScheduler", {"variance_type": "learned_range", "clip_sample": False})
    pipe = tiny_pipeline(unet=unet, scheduler=chain)
    outputs = []
    step = chain.step
    chain.step = lambda output, *rest, **options: (
        outputs.append(output) or step(output, *rest, **options)
    )
    call = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    pipe(**call, guidance_scale=3.0)
    pipe(**call, guidance_scale=9.0)
    assert outputs[0].shape == (1, 8, 8, 8)
    assert torch.equal(outputs[0][:, 4:], outputs[2][:, 4:])
    assert not torch.equal(outputs[0][:, :4], outputs[2][:, :4])


def test_half_precision_keeps_latents_in_float32():
    pipe = tiny_pipeline().to(torch.bfloat16)
    result = pipe("a cat", num_inference_steps=2, seed=1, output_type="latent")
    assert result.images.dtype == torch.float32
    images = pipe("a cat", num_inference_steps=2, seed=1, output_type="np").images
    assert np.isfinite(images).all()


def test_overflow_is_an_error_not_a_black_image():
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        pipe("a cat", num_inference_steps=2, seed=1)


def test_safety_checker_blacks_out_what_it_refuses():
    def refuse_second(images, clip_input):
        assert clip_input.shape == (2, 3, 32, 32)
        images = images.clone()
        images[1] = 0
        return images, [False, True]

    pipe = tiny_pipeline(**tiny_safety_checker())
    pipe.safety_checker.forward = refuse_second
    result = pipe(PROMPTS, num_inference_steps=2, seed=1, output_type="np")
    assert result.nsfw_content_detected == [False, True]
    assert result.images[0].any()
    assert not result.images[1].any()
