"""Image-to-image and inpainting: equal to stock diffusers, each image by its own seed."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from fakes_pipeline import SIZE, ddim, tiny_components, tiny_pipeline, tiny_unet
from PIL import Image

from latentdiff.models.latents import LatentCodec

STEP = 1 / 255
SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
]
CASES = [(name, 0.6) for name in SCHEDULERS]
CASES += [("DDPMScheduler", 1.0), ("EulerDiscreteScheduler", 1.0)]


def scheduler(name):
    return getattr(diffusers, name).from_config(ddim().config)


def stock(cls, **changes):
    pipe = cls(**tiny_components(**changes), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photo(seed=0, size=(SIZE, SIZE)):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def left_half(size=(SIZE, SIZE)):
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


MASKED = {"image": photo(), "mask_image": left_half()}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(("name", "strength"), CASES)
def test_image_to_image_equals_stock(name, strength):
    call = {"image": [photo(1), photo(2)], "strength": strength, "num_inference_steps": 4}
    call |= {"guidance_scale": 4.0, "output_type": "np"}
    prompts = ["a cat", "a red heart"]
    expected = stock(StableDiffusionImg2ImgPipeline, scheduler=scheduler(name))(
        prompts, generator=generators(1, 2), **call
    ).images
    images = tiny_pipeline(scheduler=scheduler(name))(prompts, seed=1, **call).images
    assert np.abs(images - expected).max() <= STEP


@pytest.mark.parametrize("num_channels", [4, 9])
@pytest.mark.parametrize(("name", "strength"), CASES)
def test_inpainting_equals_stock(name, strength, num_channels):
    call = {"image": photo(1), "mask_image": left_half(), "strength": strength}
    call |= {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    parts = {"scheduler": scheduler(name), "unet": tiny_unet(in_channels=num_channels)}
    expected = stock(StableDiffusionInpaintPipeline, **parts)(
        "a cat", generator=generators(3), height=SIZE, width=SIZE, **call
    ).images
    images = tiny_pipeline(**parts)("a cat", seed=3, **call).images
    assert np.abs(images - expected).max() <= STEP


def corner_mask(size, *box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize("num_channels", [4, 9])
@pytest.mark.parametrize("box", [(10, 20, 30, 28), (0, 0, 70, 50)])
def test_the_part_around_a_mask_is_made_and_pasted_as_in_stock(box, num_channels):
    image, mask = photo(1, (80, 60)), corner_mask((80, 60), *box)
    call = {"image": image, "mask_image": mask, "padding_mask_crop": 6}
    call |= {"num_inference_steps": 2, "guidance_scale": 4.0}
    parts = {"scheduler": ddim(), "unet": tiny_unet(in_channels=num_channels)}
    expected = stock(StableDiffusionInpaintPipeline, **parts)(
        "a cat", generator=generators(3), strength=1.0, **call
    ).images[0]
    made = tiny_pipeline(**parts)("a cat", seed=3, **call).images[0]
    assert made.size == (80, 60)
    difference = np.abs(np.asarray(made, dtype=int) - np.asarray(expected))
    assert difference.max() <= 1
    known = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(made)[known], np.asarray(image)[known])
    assert not np.array_equal(np.asarray(made)[~known], np.asarray(image)[~known])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_inpainting_model_keeps_what_is_not_masked_where_it_is_asked_to(strength):
    pipe = tiny_pipeline(scheduler=ddim(), unet=tiny_unet(in_channels=9))
    image, mask = photo(1), left_half()
    call = {"image": image, "mask_image": mask, "strength": strength, "num_inference_steps": 4}
    kept, anew, again = (
        pipe("a cat", seed=3, output_type="latent", keep_unmasked=keeps, **call).images
        for keeps in (True, False, False)
    )
    torch.testing.assert_close(anew, again, rtol=0, atol=0)
    half = kept.shape[-1] // 2
    if strength == 1:
        pixels = VaeImageProcessor(vae_scale_factor=1).preprocess(image)
        known = LatentCodec(pipe.vae).encode(pixels, None)
    else:  # encoded at random, as by a model that reads no mask
        others = tiny_pipeline(scheduler=ddim(), unet=tiny_unet(in_channels=4))
        known = others("a cat", seed=3, output_type="latent", **call).images
    torch.testing.assert_close(kept[..., half:], known[..., half:], rtol=0, atol=1e-6)
    assert (anew - known)[..., half:].abs().max() > 0.1
    assert (kept - anew)[..., :half].abs().max() > 0  # the chain sees what was kept
    made = pipe("a cat", seed=3, keep_unmasked=True, **call).images[0]
    assert json.loads(made.info["latentdiff"])["call"]["keep_unmasked"] is True


def test_a_model_that_reads_no_mask_keeps_what_is_not_masked_anyway():
    pipe = tiny_pipeline(scheduler=ddim())
    call = MASKED | {"num_inference_steps": 2, "output_type": "np"}
    plain, kept = (pipe("a cat", seed=3, keep_unmasked=k, **call).images for k in (False, True))
    assert np.array_equal(plain, kept)


def test_parts_of_several_images_are_each_as_alone_and_made_again_from_their_settings():
    pipe, images = tiny_pipeline(scheduler=ddim()), [photo(1, (80, 60)), photo(2, (48, 64))]
    masks = [corner_mask((80, 60), 8, 8, 20, 20), corner_mask((24, 32), 4, 4, 20, 9)]
    call = {"num_inference_steps": 1, "padding_mask_crop": 4}
    given = {"image": images, "mask_image": masks, "num_images_per_prompt": 2}
    together = pipe(["a cat", "a dog"], seed=5, **given, **call).images
    assert [one.size for one in together] == [(80, 60)] * 2 + [(48, 64)] * 2
    settings = json.loads(together[3].info["latentdiff"])["call"]
    alone = pipe(image=images[1], mask_image=masks[1], **settings).images[0]
    difference = np.abs(np.asarray(alone, dtype=int) - np.asarray(together[3]))
    assert difference.max() <= 1


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("masked", [False, True])
def test_image_of_a_batch_equals_the_image_made_alone(name, masked):
    pipe = tiny_pipeline(scheduler=scheduler(name))
    call = {"strength": 0.8, "num_inference_steps": 4, "output_type": "np", "image": photo(1)}
    call |= {"mask_image": left_half()} if masked else {}
    together = pipe("a cat", seed=[5, 6], num_images_per_prompt=2, **call).images
    for seed, image in zip([5, 6], together, strict=True):
        assert np.abs(pipe("a cat", seed=seed, **call).images[0] - image).max() <= STEP


def test_one_image_a_prompt_serves_all_images_of_that_prompt():
    pipe = tiny_pipeline()
    call = {"strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    prompts, images = ["a cat", "a red heart"], [photo(1), photo(2)]
    together = pipe(prompts, image=images, num_images_per_prompt=2, seed=[1, 2, 3, 4], **call)
    alone = pipe("a cat", image=photo(1), seed=2, **call)
    assert np.abs(alone.images[0] - together.images[1]).max() <= STEP


def test_what_is_not_painted_stays_as_decoded_from_its_latents():
    pipe = tiny_pipeline()
    call = {"num_inference_steps": 4, "seed": 1, "output_type": "latent"}
    black = Image.new("L", (SIZE, SIZE), 0)
    kept = pipe("a cat", image=photo(1), mask_image=black, **call).images
    painted = pipe("a red heart", image=photo(1), mask_image=left_half(), **call).images
    assert torch.equal(kept[..., 4:], painted[..., 4:])
    assert not torch.equal(kept[..., :4], painted[..., :4])


def test_less_strength_keeps_more_of_the_image():
    pipe = tiny_pipeline()
    call = {"num_inference_steps": 10, "seed": 1, "output_type": "latent", "image": photo(1)}
    start = pipe("a cat", strength=0.1, **call).images
    weak, strong = (pipe("a cat", strength=s, **call).images for s in (0.3, 0.9))
    assert (weak - start).abs().mean() < (strong - start).abs().mean()


def test_size_is_the_image_s_own_by_default():
    pipe = tiny_pipeline()
    call = {"num_inference_steps": 2, "seed": 1}
    assert pipe("a cat", image=photo(1, (46, 21)), **call).images[0].size == (44, 20)
    assert pipe("a cat", image=photo(1), height=16, width=24, **call).images[0].size == (24, 16)


def test_every_kind_of_image_is_the_same_image():
    pipe = tiny_pipeline()
    call = {"strength": 0.7, "num_inference_steps": 4, "seed": 1, "output_type": "np"}
    source, mask = photo(1), left_half()
    array = np.asarray(source)
    unit = array.astype(np.float32) / 255
    tensor = torch.from_numpy(unit).permute(2, 0, 1)
    mask_array = np.asarray(mask).astype(np.float32) / 255
    expected = pipe("a cat", image=source, mask_image=mask, **call).images
    for image in (array, unit, unit[None], tensor, tensor[None], [tensor], [source]):
        for one in (mask, mask_array, torch.from_numpy(mask_array)[None], [mask]):
            got = pipe("a cat", image=image, mask_image=one, **call).images
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_photograph_is_turned_upright_and_put_on_white():
    pipe = tiny_pipeline()
    call = {"strength": 0.7, "num_inference_steps": 4, "seed": 1, "output_type": "np"}
    upright = photo(1)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    clear = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    white = Image.new("RGB", (SIZE, SIZE), "white")
    for image, expected in ((turned, upright), (clear, white)):
        got = pipe("a cat", image=image, **call).images
        assert np.array_equal(got, pipe("a cat", image=expected, **call).images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": left_half()}, "mask_image needs the image"),
        ({"strength": 0.5}, "strength=0.5 needs an image"),
        ({"image": photo(), "strength": 0}, "strength=0 of num_inference_steps=50 leaves no step"),
        ({"image": photo(), "strength": 0.01}, "leaves no step"),
        ({"image": photo(), "strength": 1.5}, "strength must lie in"),
        ({"image": photo(), "strength": "all"}, "strength must be a number"),
        ({"image": []}, "image is an empty list"),
        ({"image": 3}, "image must be a PIL image"),
        ({"image": [photo(), "x"]}, r"image\[1\] must be"),
        ({"image": [photo(), np.zeros((8, 8, 3), np.uint8)]}, "image must hold images of one"),
        ({"image": [photo()] * 3}, "image has 3 images for 1 prompts"),
        ({"image": np.zeros((8, 8), np.uint8)}, "image must have shape"),
        ({"image": np.zeros((8, 8, 3), np.int64)}, "image must be an array of uint8"),
        ({"image": torch.zeros(3, 8)}, "image must be a floating tensor"),
        ({"image": torch.zeros(4, 8, 8)}, "image must have 3 channels"),
        ({"image": torch.full((3, 8, 8), 2.0)}, r"image must lie in \[0, 1\]"),
        ({"image": torch.full((3, 8, 8), float("nan"))}, "image must lie in"),
        ({"image": photo(), "mask_image": torch.zeros(3, 8, 8)}, "mask_image has 3 images"),
        ({"image": photo(0, (3, 3))}, "image is 3 x 3 pixels .* less than 4 on a side"),
        ({"image": photo(), "padding_mask_crop": 4}, "padding_mask_crop needs mask_image"),
        ({"image": photo(), "keep_unmasked": True}, "keep_unmasked needs mask_image"),
        ({**MASKED, "keep_unmasked": 1}, "keep_unmasked must be True or False"),
        ({**MASKED, "padding_mask_crop": -1}, "padding_mask_crop must lie in 0..4096"),
        ({**MASKED, "padding_mask_crop": 1.5}, "padding_mask_crop must be a whole number"),
        ({**MASKED, "padding_mask_crop": 4, "output_type": "np"}, "output_type is 'np'; leave"),
        (
            {"image": photo(), "mask_image": torch.ones(SIZE, SIZE), "padding_mask_crop": 4},
            "padding_mask_crop crops PIL images",
        ),
        (
            {"image": photo(), "mask_image": Image.new("L", (8, 8)), "padding_mask_crop": 4},
            "mask_image is black all over",
        ),
    ],
)
def test_bad_image_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()("a cat", **arguments)


def test_inpainting_model_asks_for_what_it_reads():
    pipe = tiny_pipeline(unet=tiny_unet(in_channels=9))
    with pytest.raises(ValueError, match="inpainting model: its U-Net also reads image and mask"):
        pipe("a cat")
    with pytest.raises(ValueError, match="also reads mask_image"):
        pipe("a cat", image=photo())


def test_inpainting_model_is_saved_as_stock_s_inpainting_pipeline(tmp_path):
    tiny_pipeline(unet=tiny_unet(in_channels=9)).save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is StableDiffusionInpaintPipeline
