"""SDXL: every image is stock's, from the prompts, sizes and images that stock takes."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from fakes_pipeline import SIZE
from fakes_sdxl import (
    POOLED,
    STOCK_BY_KIND,
    WIDTHS,
    sdxl_components,
    sdxl_pipeline,
    sdxl_scheduler,
    sdxl_unet,
    stock_sdxl,
)
from PIL import Image
from test_image_inputs import photo

from latentdiff.models.build import make_flow_scheduler
from latentdiff.models.components import load_components
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.png_metadata import read_settings

STEP = 1 / 255
CPU = torch.device("cpu")
PROMPTS = ["a red heart", "a green apple"]
CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
STOCK_SIZE = {"height": SIZE, "width": SIZE}
SCHEDULERS = [
    ("EulerDiscreteScheduler", {}),
    ("DDIMScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {}),
    ("HeunDiscreteScheduler", {}),
]
LONG = "a red heart a green apple a yellow cat the blue sea the sky a table a face " * 2


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def mask():
    white = np.zeros((SIZE, SIZE), np.uint8)
    white[8:24, 4:20] = 255
    return Image.fromarray(white)


def far(images, expected):
    assert expected.std() > 0.02
    return np.abs(images - expected).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as stock diffusers saves it."""
    path = tmp_path_factory.mktemp("sdxl") / "model"
    stock_sdxl().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", STOCK_BY_KIND)
@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_image_equals_stock(name, settings, kind):
    given, size = {}, STOCK_SIZE
    if kind != "text":
        given = {"image": [photo()] * 2, "strength": 0.7}
        size = {} if kind == "image" else STOCK_SIZE
    if kind == "mask":
        given["mask_image"] = [mask()] * 2
    call = CALL | given | {"num_inference_steps": 4}
    scheduler = sdxl_scheduler(name, **settings)
    stock = stock_sdxl(STOCK_BY_KIND[kind], scheduler=scheduler)
    expected = stock(PROMPTS, generator=generators(1, 2), **call, **size).images
    pipe = sdxl_pipeline(scheduler=sdxl_scheduler(name, **settings))
    assert far(pipe(PROMPTS, seed=1, **call).images, expected) <= STEP


@pytest.mark.parametrize(
    "objective",
    [
        {"prediction_type": "v_prediction"},
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ],
)
def test_image_of_each_objective_equals_stock(objective, tmp_path):
    """What is exported says what was trained, so that stock samples it as we do."""
    if "use_flow_sigmas" in objective:
        schedulers = [make_flow_scheduler()]
        schedulers += [diffusers.DPMSolverMultistepScheduler.from_config(schedulers[0].config)]
    else:
        schedulers = [sdxl_scheduler(**objective)]
    for number, scheduler in enumerate(schedulers):
        pipe = sdxl_pipeline(scheduler=scheduler)
        pipe.save_pretrained(tmp_path / f"{number}")
        stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / f"{number}")
        stock.set_progress_bar_config(disable=True)
        assert type(stock.scheduler) is type(scheduler)
        assert objective.items() <= stock.scheduler.config.items()
        expected = stock("a cat", generator=generators(1), **CALL, **STOCK_SIZE).images
        assert far(pipe("a cat", seed=1, **CALL).images, expected) <= STEP


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS)
def test_inpainting_unet_equals_stock(name, settings):
    call = CALL | {"image": photo(), "mask_image": mask(), "strength": 1.0}
    parts = {"unet": sdxl_unet(in_channels=9)}
    stock = stock_sdxl(
        StableDiffusionXLInpaintPipeline, **parts, scheduler=sdxl_scheduler(name, **settings)
    )
    expected = stock("a cat", generator=generators(1), **call, **STOCK_SIZE).images
    pipe = sdxl_pipeline(**parts, scheduler=sdxl_scheduler(name, **settings))
    assert far(pipe("a cat", seed=1, **call).images, expected) <= STEP
    with pytest.raises(ValueError, match="inpainting model"):
        pipe("a cat")


@pytest.mark.parametrize("force_zeros", [True, False])
@pytest.mark.parametrize("negative", [None, "", "the sea"])
def test_null_prompt_is_stock_s(negative, force_zeros):
    stock, zeros = stock_sdxl(), {"force_zeros_for_empty_prompt": force_zeros}
    stock.register_to_config(**zeros)
    call = CALL | {"negative_prompt": negative}
    expected = stock("a cat", generator=generators(1), **call, **STOCK_SIZE).images
    images = sdxl_pipeline(**zeros)("a cat", seed=1, **call).images
    assert far(images, expected) <= STEP
    other = sdxl_pipeline()("a cat", seed=1, **CALL | {"negative_prompt": "a table"}).images
    assert not np.array_equal(images, other)


def test_sizes_and_the_second_prompt_are_stock_s_and_make_the_image_again():
    given = {
        "prompt": "a cat",
        "prompt_2": "blue sea, sky",
        "negative_prompt": "a table",
        "negative_prompt_2": "a face",
        "original_size": (700, 900),
        "crops_coords_top_left": (0, 100),
        "target_size": (1024, 1000),
        "negative_original_size": (64, 64),
        "negative_crops_coords_top_left": (5, 0),
        "negative_target_size": (512, 512),
        "clip_skip": 1,
    }
    expected = stock_sdxl()(**given, generator=generators(1), **CALL, **STOCK_SIZE).images
    pipe = sdxl_pipeline()
    result = pipe(**given, seed=1, **CALL)
    assert far(result.images, expected) <= STEP
    settings = json.loads(json.dumps(result.settings[0]["call"]))
    assert settings["original_size"] == [700, 900]
    assert settings["prompt_2"] == "blue sea, sky"
    assert np.array_equal(pipe(**settings, output_type="np").images, result.images)
    plain = pipe("a cat", seed=1, **CALL)
    assert not {"prompt_2", "original_size"} & plain.settings[0]["call"].keys()
    assert not np.array_equal(plain.images, result.images)


def test_negative_sizes_are_by_default_the_prompt_s():
    pipe, sizes = sdxl_pipeline(), {"original_size": (300, 200), "crops_coords_top_left": (9, 8)}
    same = {f"negative_{name}": value for name, value in sizes.items()}
    images = pipe("a cat", seed=1, **CALL, **sizes).images
    assert np.array_equal(pipe("a cat", seed=1, **CALL, **sizes, **same).images, images)
    assert not np.array_equal(pipe("a cat", seed=1, **CALL).images, images)


def test_encode_prompt_returns_stock_s_four_tensors_from_the_text_parts_alone():
    nothing = {"unet": None, "vae": None, "scheduler": None}
    arguments = {"device": CPU, "num_images_per_prompt": 2, "do_classifier_free_guidance": True}
    texts = {"prompt": PROMPTS, "negative_prompt": ["", "a table"]}
    with torch.no_grad():
        expected = stock_sdxl().encode_prompt(**texts, **arguments)
        alone = LatentDiffPipeline(**sdxl_components(**nothing))
        found = alone.encode_prompt(**texts, **arguments)
    assert [tuple(one.shape) for one in found] == [(4, 16, sum(WIDTHS))] * 2 + [(4, POOLED)] * 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    names = "prompt_embeds", "negative_prompt_embeds"
    names = *names, *(f"{name.removesuffix('prompt_embeds')}pooled_prompt_embeds" for name in names)
    no_text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    call = CALL | {"seed": [1, 2, 3, 4]}
    images = sdxl_pipeline(**no_text)(**dict(zip(names, found, strict=True)), **call).images
    assert np.array_equal(images, sdxl_pipeline()(**texts, num_images_per_prompt=2, **call).images)


def test_without_guidance_there_are_no_negative_embeddings():
    with torch.no_grad():
        found = sdxl_pipeline().encode_prompt("a cat", CPU, 1, False)
    assert [one is None for one in found] == [False, True, False, True]


@pytest.mark.parametrize("long_prompts", ["truncate", "chunks"])
def test_image_of_a_batch_equals_the_image_made_alone(long_prompts):
    pipe = sdxl_pipeline()
    call = CALL | {"long_prompts": long_prompts, "guidance_interval": (0.2, 1.0)}
    prompts = ["a (red:1.5) heart", LONG, ""]
    together = pipe(prompts, seed=[5, 99, 7], **call).images
    for prompt, seed, image in zip(prompts, [5, 99, 7], together, strict=True):
        assert np.abs(pipe(prompt, seed=seed, **call).images[0] - image).max() <= STEP


def test_guidance_ends_with_its_interval():
    pipe = sdxl_pipeline(scheduler=sdxl_scheduler("DDIMScheduler"))
    call = CALL | {"prompt": PROMPTS, "seed": 1, "negative_prompt": "a table"}
    plain = pipe(**call | {"guidance_scale": 1.0}).images
    none, some, whole = (
        pipe(**call, guidance_interval=interval).images
        for interval in ((0, 1e-6), (0, 0.5), (0, 1))
    )
    assert np.abs(none - plain).max() <= STEP
    assert np.array_equal(whole, pipe(**call).images)
    assert not np.array_equal(some, whole)
    assert not np.array_equal(some, none)


def test_weights_and_windows_change_the_image():
    pipe = sdxl_pipeline()
    plain = pipe("a red heart", seed=1, **CALL).images
    assert np.array_equal(pipe("a (red:1.0) heart", seed=1, **CALL).images, plain)
    assert not np.array_equal(pipe("a (red:1.6) heart", seed=1, **CALL).images, plain)
    whole, cut = (
        pipe(LONG, seed=1, long_prompts=name, **CALL).images for name in ("chunks", "truncate")
    )
    assert not np.array_equal(whole, cut)
    other = pipe("a cat", prompt_2=LONG, long_prompts="chunks", seed=1, **CALL).images
    assert np.isfinite(other).all()  # the first encoder's one window is followed by empty ones


def test_saved_folder_opens_in_stock_and_gives_the_same_image(folder, tmp_path):
    pipe = LatentDiffPipeline.from_pretrained(folder)
    assert pipe.is_sdxl
    assert pipe.config.force_zeros_for_empty_prompt
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert not {"safety_checker", "requires_safety_checker"} & index.keys()
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path, add_watermarker=False)
    assert type(stock) is StableDiffusionXLPipeline
    stock.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    expected = stock("a cat", generator=generators(4), **CALL, **STOCK_SIZE).images
    assert far(pipe("a cat", seed=4, **CALL).images, expected) <= STEP


def test_components_are_recognised_by_their_configs(folder):
    components = load_components(folder)
    assert components.text_encoder_2 is not None
    assert components.force_zeros_for_empty_prompt
    ids = components.text_encoders.tokenize(PROMPTS)
    assert ids.shape == (2, 2, 16)
    assert (ids[:, 0, -1] != ids[:, 1, -1]).all()  # two paddings
    with torch.no_grad():
        found = components.text_encoders.encode(ids)
        embeds, _, pooled, _ = stock_sdxl().encode_prompt(PROMPTS, device=CPU)
    torch.testing.assert_close(found.prompt_embeds, embeds)
    torch.testing.assert_close(found.pooled_embeds, pooled)
    pipe = LatentDiffPipeline.from_pretrained(folder, force_zeros_for_empty_prompt=False)
    assert not pipe.config.force_zeros_for_empty_prompt


def test_a_refiner_is_refused_as_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "refiner")
    path = tmp_path / "refiner" / "model_index.json"
    none = {name: [None, None] for name in ("text_encoder", "tokenizer")}
    path.write_text(json.dumps(json.loads(path.read_text()) | none))
    with pytest.raises(ValueError, match=r"names no text_encoder.*refiner"):
        LatentDiffPipeline.from_pretrained(tmp_path / "refiner")


def test_half_precision_keeps_sizes_exact_and_latents_in_float32():
    pipe = sdxl_pipeline().to(torch.bfloat16)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda unet, args, named: seen.append(named["added_cond_kwargs"]), with_kwargs=True
    )
    call = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    latents = pipe("a cat", original_size=(1023, 2047), **call).images
    assert latents.dtype == torch.float32
    assert torch.isfinite(latents).all()
    assert seen[0]["time_ids"][-1].tolist() == [1023, 2047, 0, 0, SIZE, SIZE]
    assert seen[0]["text_embeds"].dtype == torch.bfloat16


def test_callback_sees_stock_s_tensors_and_can_end_guidance():
    def cut(pipe, i, t, tensors):
        if i == 0:
            pipe._guidance_scale = 0.0
            return {name: x.chunk(2)[-1] for name, x in tensors.items()}
        return {}

    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    call = CALL | {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": names}
    expected = stock_sdxl()("a cat", generator=generators(1), **call, **STOCK_SIZE).images
    assert far(sdxl_pipeline()("a cat", seed=1, **call).images, expected) <= STEP


def test_fast_cpu_path_gives_the_same_image():
    pipe = sdxl_pipeline()
    call = CALL | {"prompt": PROMPTS, "seed": 1, "negative_prompt": "a table"}
    plain = pipe(**call).images
    pipe.fast_cpu.is_on = True
    assert np.abs(pipe(**call).images - plain).max() <= STEP


def test_offloading_gives_the_same_image():
    expected = sdxl_pipeline()("a cat", seed=1, **CALL).images
    pipe = sdxl_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(pipe("a cat", seed=1, **CALL).images, expected)


def test_rescaled_guidance_and_a_tiled_vae_equal_stock():
    stock, pipe = stock_sdxl(), sdxl_pipeline()
    for one in (stock, pipe):
        one.vae.enable_tiling()
    call = CALL | {"guidance_rescale": 0.7, "height": 80, "width": 64}
    expected = stock("a cat", generator=generators(1), **call).images
    images = pipe("a cat", seed=1, **call).images
    assert far(images, expected) <= STEP
    pipe.vae.disable_tiling()
    assert not np.array_equal(pipe("a cat", seed=1, **call).images, images)
    assert not np.array_equal(
        pipe("a cat", seed=1, **call | {"guidance_rescale": 0.0}).images, images
    )


def test_guidance_scale_is_by_default_that_of_sdxl():
    pipe = sdxl_pipeline()
    image = pipe("a cat", seed=1, num_inference_steps=1).images[0]
    assert read_settings(image)["call"]["guidance_scale"] == 5.0  # SDXL's default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 16, 40)}, "pooled_prompt_embeds; pass both"),
        ({"prompt": "a", "negative_prompt_2": "b"}, "negative_prompt_2 needs negative_prompt"),
        ({"prompt": ["a", "b"], "prompt_2": ["a", "b", "c"]}, "prompt_2 has 3 texts and prompt 2"),
        (
            {"prompt": "a", "original_size": (0, 5)},
            r"original_size must be two ints, each in 1\.\.",
        ),
        ({"prompt": "a", "target_size": 512}, "target_size must be two ints"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sdxl_pipeline()(**arguments)


def test_other_models_refuse_what_sdxl_alone_reads():
    from fakes_pipeline import tiny_pipeline

    pipe = tiny_pipeline()
    for arguments in ({"prompt_2": "b"}, {"original_size": (32, 32)}):
        with pytest.raises(ValueError, match=r"is read by SDXL alone"):
            pipe("a", **arguments)
