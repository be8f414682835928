"""Images as conditions: what is saved opens in diffusers' pipeline of its kind, which agrees."""

import json

import diffusers
import numpy as np
import pytest
import torch
from fakes_conditions import controlnet_of, depth_map, generators, photo
from fakes_pipeline import SIZE, ddim, pipeline_of, tiny_pipeline, tiny_unet, tiny_vae
from fakes_sdxl import sdxl_pipeline, sdxl_unet
from PIL import Image

from latentdiff.models.compatibility import CONDITION_KINDS
from latentdiff.models.latents import LatentCodec
from latentdiff.models.unet.controlnet import make_controlnet
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.conditioning import canvas
from latentdiff.pipeline.conditioning.image_condition import ConditionInputs, read_maps
from latentdiff.pipeline.image_inputs import ImageInputs

STEP = 1 / 255
CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}


def stock_of(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours_of(folder):
    pipe = LatentDiffPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CASES = {
    "instruct_pix2pix": (
        {"condition": photo(1), "image_guidance_scale": 1.8},
        {"image": photo(1), "image_guidance_scale": 1.8},
    ),
    "upscale": (
        {"condition": photo(1, (8, 8)), "noise_level": 50},
        {"image": photo(1, (8, 8)), "noise_level": 50},
    ),
    "depth": (
        {"condition": depth_map(), "image": photo(2), "strength": 0.7},
        {"depth_map": depth_map(), "image": photo(2), "strength": 0.7},
    ),
}
INPAINT = {"image": photo(1), "mask_image": photo(2).convert("L"), "strength": 1.0}


IN_SIGMAS = [("instruct_pix2pix", "euler"), ("upscale", "euler")]  # a condition has no scale


@pytest.mark.parametrize(
    ("kind", "scheduler"), [*((kind, None) for kind in CONDITION_KINDS), *IN_SIGMAS]
)
def test_stock_opens_what_is_saved_and_makes_the_same_image(kind, scheduler, tmp_path, capfd):
    own, others = (CASES | {"inpaint": (INPAINT, INPAINT)})[kind]
    pipe = pipeline_of(kind)
    if scheduler is not None:
        pipe.set_scheduler(scheduler)
    expected = pipe("a cat", negative_prompt="sea", seed=4, **own, **CALL).images
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "latentdiff.json").read_text())["condition_kind"] == kind
    stock = stock_of(tmp_path)
    assert type(stock).__name__ == CONDITION_KINDS[kind].pipeline
    images = stock("a cat", negative_prompt="sea", generator=generators(4), **others, **CALL).images
    assert expected.std() > 0.05
    assert np.abs(images - expected).max() <= STEP
    again = ours_of(tmp_path)
    assert again.condition_kind == kind
    images = again("a cat", negative_prompt="sea", seed=4, **own, **CALL).images
    assert np.abs(images - expected).max() <= STEP
    written = capfd.readouterr().err
    assert not [text for text in ("not expected", "scaling_factor", "ignored") if text in written]


@pytest.mark.parametrize("num", [1, 2])
def test_stock_opens_controlnets_and_makes_the_same_image(num, tmp_path):
    pipe = tiny_pipeline(scheduler=ddim())
    plain = pipe("a cat", seed=4, **CALL).images
    nets = [controlnet_of(pipe.unet, seed) for seed in range(num)]
    for k, net in enumerate(nets):
        net.save_pretrained(tmp_path / f"net{k}")
    pipe.load_controlnet([tmp_path / f"net{k}" for k in range(num)])
    images, scales = [photo(1), photo(2)][:num], [0.8, 1.5][:num]
    given = images if num > 1 else images[0]
    own = {"condition": given, "controlnet_conditioning_scale": scales}
    expected = pipe("a cat", seed=4, **own, **CALL).images
    assert np.abs(expected - plain).max() > 10 * STEP
    pipe.save_pretrained(tmp_path / "saved")
    info = json.loads((tmp_path / "saved" / "latentdiff.json").read_text())
    assert info["condition_kind"] == "controlnet"
    stock = stock_of(tmp_path / "saved")
    assert type(stock) is diffusers.StableDiffusionControlNetPipeline
    others = {"image": given, "controlnet_conditioning_scale": scales if num > 1 else scales[0]}
    images = stock("a cat", generator=generators(4), **others, **CALL).images
    assert np.abs(images - expected).max() <= STEP
    again = ours_of(tmp_path / "saved")
    assert len(again.controlnets) == num
    assert np.abs(again("a cat", seed=4, **own, **CALL).images - expected).max() <= STEP
    again.unload_controlnet()
    assert np.abs(again("a cat", seed=4, **CALL).images - plain).max() <= STEP


def test_an_image_to_start_from_goes_with_a_controlnet_as_in_stock():
    pipe = tiny_pipeline(scheduler=ddim())
    pipe.load_controlnet(controlnet_of(pipe.unet, 0))
    stock = diffusers.StableDiffusionControlNetImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    call = CALL | {"image": photo(1), "strength": 0.7}
    images = pipe("a cat", condition=photo(2), seed=4, **call).images
    call |= {"control_image": photo(2), "controlnet_conditioning_scale": 1.0}
    expected = stock("a cat", generator=generators(4), **call).images
    assert np.abs(images - expected).max() <= STEP


@pytest.mark.parametrize("kind", ["instruct_pix2pix", "controlnet"])
def test_stock_opens_sdxl_of_a_kind_and_makes_the_same_image(kind, tmp_path):
    unet = sdxl_unet(in_channels=8 if kind == "instruct_pix2pix" else 4)
    pipe = sdxl_pipeline(unet=unet, scheduler=ddim())
    if kind == "controlnet":
        pipe.load_controlnet(controlnet_of(unet, 0))
    call = CALL | {"negative_prompt": "sea"}
    expected = pipe("a cat", seed=4, condition=photo(1), **call).images
    pipe.save_pretrained(tmp_path)
    stock = stock_of(tmp_path)
    name = "InstructPix2Pix" if kind == "instruct_pix2pix" else "ControlNet"
    assert type(stock).__name__ == f"StableDiffusionXL{name}Pipeline"
    size = {"height": SIZE, "width": SIZE}
    images = stock("a cat", image=photo(1), generator=generators(4), **size, **call).images
    assert expected.std() > 0.05
    assert np.abs(images - expected).max() <= STEP


def test_a_kind_of_sdxl_without_a_stock_class_is_our_own(tmp_path):
    sdxl_pipeline(unet=sdxl_unet(in_channels=5)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LatentDiffPipeline"
    assert ours_of(tmp_path).condition_kind == "depth"


@pytest.mark.parametrize("kind", CASES)
def test_image_of_a_batch_equals_the_image_made_alone(kind):
    pipe, own = pipeline_of(kind), CASES[kind][0]
    call = CALL | own
    together = pipe("a cat", seed=[5, 6], num_images_per_prompt=2, **call).images
    alone = pipe("a cat", seed=6, **call).images
    assert np.abs(alone[0] - together[1]).max() <= STEP
    other = photo(9, own["condition"].size) if kind != "depth" else depth_map(9)
    changed = pipe("a cat", seed=6, **call | {"condition": other}).images
    assert np.abs(changed - alone).max() > STEP


def test_guidance_by_the_image_of_one_is_classifier_free_guidance():
    """The third prediction is made only where it counts."""
    pipe = pipeline_of("instruct_pix2pix")
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
    call = {"condition": photo(1), "seed": 1, "num_inference_steps": 1, "output_type": "latent"}
    one = pipe("a cat", image_guidance_scale=1.0, **call).images
    almost = pipe("a cat", image_guidance_scale=1.0 + 1e-6, **call).images
    pipe("a cat", guidance_scale=1.0, **call)
    assert sizes == [2, 3, 1]
    torch.testing.assert_close(one, almost, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["upscale", "instruct_pix2pix", "controlnet"])
def test_the_fast_cpu_path_and_half_precision_make_the_same_image(kind):
    pipe = tiny_pipeline(scheduler=ddim()) if kind == "controlnet" else pipeline_of(kind)
    if kind == "controlnet":
        pipe.load_controlnet(controlnet_of(pipe.unet, 0))
    condition = photo(1, (8, 8) if kind == "upscale" else (SIZE, SIZE))
    call = CALL | {"condition": condition, "seed": [1, 2], "num_images_per_prompt": 2}
    expected = pipe("a cat", **call).images
    pipe.fast_cpu.is_on = True
    assert np.abs(pipe("a cat", **call).images - expected).max() <= STEP
    half = pipe.to(torch.bfloat16)("a cat", **call).images
    assert np.abs(half - expected).mean() < 0.1


def test_images_are_enlarged_by_the_factor_of_the_vae():
    pipe = pipeline_of("upscale")
    low_res, call = photo(1, (10, 7)), {"num_inference_steps": 2, "seed": 1}
    image = pipe.upscale(low_res, noise_level=0, **call).images[0]
    assert image.size == (40, 28)
    again = pipe("", condition=low_res, noise_level=0, **call).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(again))
    settings = json.loads(image.info["latentdiff"])
    assert settings["call"]["noise_level"] == 0
    assert len(settings["inputs"]["condition"]) == 16


def test_a_map_is_the_same_as_image_array_and_tensor():
    pipe = pipeline_of("depth")
    call = {"seed": 1, "num_inference_steps": 1, "output_type": "np"}
    grey = photo(1).convert("L")
    array = np.asarray(grey)
    expected = pipe("a cat", condition=grey, **call).images
    clear = grey.copy()
    clear.putalpha(255)
    others = [array, array[None], torch.from_numpy(array / 1.0), [grey], grey.convert("RGB"), clear]
    others += [Image.fromarray(array.astype(np.uint16) * 200), array[..., None]]
    others += [array[None, ..., None]]
    for one in others:
        images = pipe("a cat", condition=one, **call).images
        np.testing.assert_allclose(images, expected, atol=1e-4)


WIDE = np.zeros((8, 16), np.float32)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("instruct_pix2pix", {}, "condition is missing: .* an image to edit; pass condition"),
        ("instruct_pix2pix", {"image": photo()}, "next to image, which is where the chain starts"),
        ("upscale", {}, "condition is missing: .* an image in low resolution"),
        ("depth", {}, "condition is missing: .* a depth map"),
        (
            "inpaint",
            {"condition": photo(), "image": photo(), "mask_image": photo().convert("L")},
            "condition has no use here: .* a mask and the rest of an image; pass image and mask_i",
        ),
        ("none", {"condition": photo()}, "this model reads text alone; pass image to start from"),
        ("instruct_pix2pix", {"condition": "cat.png"}, "condition must be a PIL image"),
        ("instruct_pix2pix", {"condition": [photo()] * 3}, "condition has 3 images for 1 prompts"),
        ("depth", {"condition": "cat.png"}, "condition must be a map of one channel"),
        ("depth", {"condition": torch.zeros(1, 3, 8, 8)}, "condition must have one channel"),
        ("depth", {"condition": WIDE + np.nan}, "condition holds NaN or Inf"),
        (
            "depth",
            {"condition": [WIDE, WIDE.T]},
            "condition must hold maps of one kind, and arrays of",
        ),
        ("upscale", {"condition": torch.zeros(1, 8, 8)}, "condition must have 3 channels"),
        (
            "upscale",
            {"condition": photo(0, (8, 8)), "height": 16, "width": 16},
            "condition is 8 x 8 pixels .*, expected 4 x 4, for an image of 16 x 16",
        ),
        (
            "instruct_pix2pix",
            {"condition": photo(0, (32, 16)), "height": 32, "width": 32},
            "condition is 16 x 32 pixels .*, expected the shape of 32 x 32",
        ),
        ("depth", {"condition": WIDE, "image": photo()}, "condition is 8 x 16 pixels"),
        ("depth", {"condition": WIDE[:, :4], "image": photo()}, "condition is 8 x 4 pixels"),
        (
            "inpaint",
            {"image": photo(), "mask_image": Image.new("L", (16, 32))},
            "mask_image is 32 x 16 pixels .*, expected the size of image, 32 x 32",
        ),
        (
            "inpaint",
            {
                "image": photo(),
                "mask_image": [Image.new("L", one) for one in ((32, 32), (16, 32))],
                "num_images_per_prompt": 2,
            },
            r"mask_image\[1\] is 32 x 16 pixels .*, expected the size of image, 32 x 32",
        ),
        ("inpaint", {"image": photo()}, "its U-Net also reads mask_image; pass both"),
        ("inpaint", {"mask_image": photo().convert("L")}, "mask_image needs the image"),
        ("inpaint", {}, "its U-Net also reads image and mask_image; pass both"),
        ("upscale", {"condition": photo(), "noise_level": 400}, "noise_level must lie in 0..350"),
        ("upscale", {"condition": photo(), "noise_level": 1.5}, "noise_level must be a whole"),
        ("depth", {"condition": WIDE, "noise_level": 1}, "noise_level is read by upscalers alone"),
        ("none", {"image_guidance_scale": 1.5}, "image_guidance_scale is read by models that edit"),
        (
            "instruct_pix2pix",
            {"condition": photo(), "image_guidance_scale": 0.5},
            "image_guidance_scale must lie in 1..",
        ),
        ("none", {"controlnet_conditioning_scale": 1.0}, "needs a ControlNet"),
        ("none", {"window_size": 10}, "window_size must be a positive multiple of 4"),
        ("none", {"window_size": 32, "window_overlap": 1.0}, "window_overlap must lie in"),
    ],
)
def test_a_bad_condition_is_named(kind, arguments, message):
    pipe = tiny_pipeline() if kind == "none" else pipeline_of(kind)
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **arguments)


def test_guidance_by_the_image_needs_a_training_that_dropped_it():
    pipe = pipeline_of("instruct_pix2pix", condition_dropout=0.0)
    call = {"condition": photo(), "num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    with pytest.raises(ValueError, match=r"trained with condition.dropout=0 and has no prediction"):
        pipe("a cat", image_guidance_scale=1.5, **call)
    pipe("a cat", **call)
    assert pipe.guidance.image_scale == 1.0


def test_a_bad_controlnet_is_named(tmp_path):
    pipe = tiny_pipeline()
    net = controlnet_of(pipe.unet, 0)
    with pytest.raises(FileNotFoundError, match=r"there is no ControlNet \./nowhere"):
        pipe.load_controlnet("./nowhere")
    with pytest.raises(FileNotFoundError, match="expected the folder of a ControlNet"):
        pipe.load_controlnet(tmp_path)
    pipe.vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a AutoencoderKL, expected a ControlNetModel"):
        pipe.load_controlnet(tmp_path)
    other = make_controlnet(tiny_unet(cross_attention_dim=8), factor=8, seed=0)
    with pytest.raises(ValueError, match=r"cross_attention_dim is 8 .* it shrinks images 8 times"):
        pipe.load_controlnet(other)
    with pytest.raises(ValueError, match="kind depth and reads an image itself"):
        pipeline_of("depth").load_controlnet(net)
    pipe.load_controlnet([net, net])
    for bad, message in (
        ({}, "condition is missing: a ControlNet reads an image"),
        ({"condition": photo()}, "a list of 2 images, one for each ControlNet, got Image"),
        ({"condition": [photo()]}, "a list of 2 images, one for each ControlNet, got 1"),
        ({"condition": [photo(), photo(0, (16, 32))]}, r"condition\[1\] is 32 x 16 pixels"),
        ({"padding_mask_crop": 4}, "crops image and mask_image, and not the condition"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a cat", **bad)
    with pytest.raises(ValueError, match="has 3 numbers for 2 ControlNets"):
        pipe("a cat", condition=[photo()] * 2, controlnet_conditioning_scale=[1, 1, 1])


def test_only_upscalers_upscale():
    with pytest.raises(
        ValueError, match=r"reads text alone, and .* train one with condition.kind=up"
    ):
        tiny_pipeline().upscale(photo())


def test_a_unet_of_other_channels_is_refused_by_what_it_is():
    with pytest.raises(ValueError, match=r"takes 6 channels .* 9 for inpaint, 8 for instruct"):
        tiny_pipeline(unet=tiny_unet(in_channels=6))


def test_windows_without_overlap_are_images_of_their_own():
    """Latents, ControlNet's image and known part are cut where the window is."""
    pipe = tiny_pipeline(scheduler=ddim())
    pipe.load_controlnet(controlnet_of(pipe.unet, 0))
    latents = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    left, right = photo(1), photo(2)
    wide = Image.new("RGB", (2 * SIZE, SIZE))
    wide.paste(left, (0, 0))
    wide.paste(right, (SIZE, 0))
    call = {"num_inference_steps": 2, "output_type": "latent"}
    windows = {"window_size": SIZE, "window_overlap": 0.0}
    whole = pipe("a cat", condition=wide, latents=latents, **windows, **call).images
    for part, image in zip(latents.chunk(2, dim=-1), (left, right), strict=True):
        own = pipe("a cat", condition=image, latents=part, **call).images
        torch.testing.assert_close(whole[..., :8], own, atol=1e-4, rtol=1e-4)
        whole = whole[..., 8:]


def test_windows_take_as_many_passes_as_they_say_and_one_window_takes_one(caplog):
    canvas._warn_of_cost.cache_clear()
    pipe = tiny_pipeline()
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda unet, args: sizes.append(args[0].shape[-2:]))
    call = {"num_inference_steps": 1, "seed": 1, "window_size": SIZE}
    image = pipe("a cat", height=SIZE, width=2 * SIZE, **call).images[0]
    assert image.size == (2 * SIZE, SIZE)
    assert sizes == [(8, 8)] * 3
    assert "3 windows of 32 px: each step takes 3 passes of the U-Net" in caplog.messages
    assert json.loads(image.info["latentdiff"])["call"]["window_size"] == SIZE
    plain = pipe("a cat", num_inference_steps=1, seed=1, output_type="np").images
    assert np.array_equal(pipe("a cat", **call, output_type="np").images, plain)


def test_a_controlnet_that_pools_its_image_leaves_the_negative_prompt_alone_as_in_stock():
    pipe = tiny_pipeline(scheduler=ddim())
    net = controlnet_of(pipe.unet, 0)
    net.register_to_config(global_pool_conditions=True)
    pipe.load_controlnet(net)
    expected = pipe("a cat", condition=photo(1), seed=4, **CALL).images
    stock = diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    images = stock("a cat", image=photo(1), generator=generators(4), **CALL).images
    assert np.abs(images - expected).max() <= STEP


def test_nested_lists_hold_the_images_of_a_prompt_as_in_stock():
    pipe = tiny_pipeline(scheduler=ddim())
    nets = [controlnet_of(pipe.unet, seed) for seed in range(2)]
    pipe.load_controlnet(nets)
    given = [[photo(1), photo(2)], [photo(3), photo(4)]]
    prompts, call = ["a cat", "a red heart"], CALL | {"seed": [4, 5]}
    together = pipe(prompts, condition=given, **call).images
    for k, one in enumerate(given):
        alone = pipe(prompts[k], condition=one, **call | {"seed": 4 + k}).images
        assert np.abs(alone[0] - together[k]).max() <= STEP
    with pytest.raises(ValueError, match=r"condition\[0\], of one prompt, must be a list of 2 im"):
        pipe(["a cat"] * 3, condition=[[photo()] * 3] * 2, **call | {"seed": 1})


def test_images_are_enlarged_together_each_as_alone():
    pipe = pipeline_of("upscale")
    low_res, call = [photo(1, (8, 8)), photo(2, (8, 8))], {"num_inference_steps": 2}
    call |= {"output_type": "np"}
    together = pipe.upscale(low_res, seed=[3, 4], **call).images
    alone = pipe.upscale(low_res[1], seed=4, **call).images
    assert np.abs(together[1] - alone[0]).max() <= STEP
    twice = pipe.upscale(low_res[1], seed=4, num_images_per_prompt=2, **call).images
    assert len(twice) == 2


def test_enlarging_without_words_needs_one_prediction_a_step():
    pipe = pipeline_of("upscale")
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
    call = {"num_inference_steps": 1, "seed": 1, "output_type": "np"}
    images = pipe.upscale(photo(1, (8, 8)), **call).images
    guided = pipe.upscale(photo(1, (8, 8)), guidance_scale=7.5, **call).images
    pipe.upscale(photo(1, (8, 8)), "a cat", **call)
    assert sizes == [1, 2, 2]
    assert np.abs(images - guided).max() <= STEP


BEYOND = [  # kind, arguments, what the warning names
    ("none", {"height": 128, "width": 128}, "take height=32, width=32, or window_size=32"),
    ("none", {"height": 128, "width": 128, "window_size": 64}, "take window_size=32"),
    ("upscale", {"condition": photo(0, (32, 32))}, "take a smaller condition, or window_size=32"),
    ("instruct_pix2pix", {"condition": photo(0, (64, 64))}, "take height=32, width=32, or wind"),
    ("upscale", {"condition": photo(0, (32, 32)), "window_size": 32}, None),
    ("none", {"image": photo(0, (64, 64)), "strength": 1.0}, None),
]


@pytest.mark.parametrize(("kind", "arguments", "advice"), BEYOND)
def test_passes_beyond_the_trained_size_are_warned_of(kind, arguments, advice, caplog):
    canvas._warn_of_size.cache_clear()
    pipe = tiny_pipeline() if kind == "none" else pipeline_of(kind)
    call = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    pipe("a cat", **arguments, **call)
    found = [text for text in caplog.messages if "this model was trained at" in text]
    assert len(found) == (advice is not None)
    assert advice is None or advice in found[0]


@pytest.mark.parametrize(
    ("kind", "name", "size", "message"),
    [
        (
            "upscale",
            "condition",
            (1100, 1100),
            "condition is 1100 x 1100 .* for an image of 4400 x",
        ),
        ("depth", "condition", (3, 3), "condition is 3 x 3 pixels .*, less than 4 on a side"),
        ("none", "image", (3, 9), "image is 9 x 3 pixels .*, less than 4 on a side"),
    ],
)
def test_an_image_of_a_size_that_cannot_be_made_is_named(kind, name, size, message):
    pipe = tiny_pipeline() if kind == "none" else pipeline_of(kind)
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **{name: photo(0, size)})


def test_image_guidance_of_one_is_made_again_from_its_settings():
    pipe = pipeline_of("instruct_pix2pix")
    call = {"num_inference_steps": 1, "condition": photo(1)}
    image = pipe("a cat", seed=1, image_guidance_scale=1.0, **call).images[0]
    settings = json.loads(image.info["latentdiff"])["call"]
    again = pipe(**settings, condition=photo(1)).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(again))
    assert (
        "image_guidance_scale"
        not in json.loads(
            tiny_pipeline()("a cat", num_inference_steps=1, seed=1).images[0].info["latentdiff"]
        )["call"]
    )


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((SIZE, SIZE, 3), np.float32),
        np.zeros((SIZE, SIZE, 4), np.uint8),
        torch.zeros(3, SIZE, SIZE),
    ],
)
def test_colors_are_no_maps(given):
    with pytest.raises(ValueError, match=r"condition has shape .*, as an image in color, expected"):
        pipeline_of("depth")("a cat", condition=given, num_images_per_prompt=3)


def test_sizes_of_sdxl_are_those_of_a_window():
    pipe = sdxl_pipeline(scheduler=ddim())
    seen = []

    def read(module, args, kwargs):
        seen.append(kwargs["added_cond_kwargs"]["time_ids"][0].tolist())

    pipe.unet.register_forward_pre_hook(read, with_kwargs=True)
    call = {"num_inference_steps": 1, "seed": 1, "output_type": "latent", "height": SIZE}
    pipe("a cat", width=2 * SIZE, window_size=SIZE, **call)
    assert seen[-1] == [SIZE, SIZE, 0, 0, SIZE, SIZE]
    pipe("a cat", width=2 * SIZE, window_size=SIZE, target_size=(64, 96), **call)
    assert seen[-1] == [SIZE, SIZE, 0, 0, 64, 96]


def test_a_map_larger_than_its_image_is_read_as_in_training():
    """It becomes as large as the image, antialiased, and only then as large as the latents."""
    lines = Image.new("L", (4 * SIZE, 4 * SIZE))
    for x in range(0, 4 * SIZE, 9):
        lines.paste(255, (x, 0, x + 1, 4 * SIZE))

    def channels(given):
        condition = ConditionInputs("depth", (ImageInputs(read_maps("condition", given)),))
        codec, shape = LatentCodec(tiny_vae()), (1, 4, SIZE // 4, SIZE // 4)
        (found,) = condition.tensors(codec, shape=shape, generator=None, device="cpu").values()
        return found

    expected = channels(np.asarray(lines.resize((SIZE, SIZE))))
    assert (channels(lines) - expected).abs().mean() < 0.02  # 8 bits
    assert (channels(np.asarray(lines)) - expected).abs().mean() > 0.1  # as stock's depth_map


def test_guidance_by_the_image_that_is_off_is_warned_of(caplog):
    pipe = pipeline_of("instruct_pix2pix")
    call = {"condition": photo(), "num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    pipe("a cat", guidance_scale=1.0, **call)
    assert not [text for text in caplog.messages if "has no effect" in text]
    pipe("a cat", guidance_scale=1.0, image_guidance_scale=5.0, **call)
    assert [text for text in caplog.messages if "image_guidance_scale=5 has no effect" in text]


def test_arguments_of_stock_s_controlnet_say_where_they_go():
    pipe = tiny_pipeline()
    call = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    pipe("a cat", guess_mode=False, control_guidance_start=0.0, control_guidance_end=1.0, **call)
    for name, value, message in (
        ("guess_mode", True, "StableDiffusionControlNetPipeline.from_pipe"),
        ("control_guidance_end", 0.5, "StableDiffusionControlNetPipeline.from_pipe"),
        ("control_image", photo(), "reads as condition"),
        ("depth_map", depth_map(), "pass it as condition"),
    ):
        with pytest.raises(ValueError, match=f"{name} is not supported here; .*{message}"):
            pipe("a cat", **{name: value})
