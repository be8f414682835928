"""Sample sheets during a run: fixed prompts, each with its own seed, and their nearest images.

A prompt's seed depends on the run's seed and the prompt alone, so adding a prompt does not change
the others' images. The prompts are shared out over the processes in batches of one size, so that
neither does the number of processes. Captions are taken verbatim, as in training; prompts that a
person typed may weigh words. A model that reads an image gets the condition as training encoded it.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ControlNetModel
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latentdiff.atomic import atomic_file
from latentdiff.config.text_to_image import Config
from latentdiff.evaluation.metrics.heldout_loss import rank_batches
from latentdiff.image_grid import BOXES, TILES, draw_grid, to_pil
from latentdiff.models.compatibility import CONTROLNET
from latentdiff.models.components import Components, choose_vae, load_vae
from latentdiff.models.latents import Autoencoder, LatentCodec, set_scale
from latentdiff.models.unet.image_conditions import condition_pixels
from latentdiff.pipeline import LatentDiffPipeline, checks
from latentdiff.pipeline.conditioning.canvas import trained_size_px
from latentdiff.pipeline.conditioning.image_condition import ConditionInputs, EncodedCondition
from latentdiff.pipeline.conditioning.prompt import parse_prompt
from latentdiff.pipeline.files.model_info import ModelInfo, image_guidance
from latentdiff.pipeline.output import LARGE
from latentdiff.sampling.batch_sampler import generate_images
from latentdiff.sampling.resume_folder import write_image_table
from latentdiff.training.inputs.conditions import FixedCondition
from latentdiff.training.text_to_image.memory_modes import idle_parts_on
from latentdiff.training.text_to_image.nearest_images import (
    NearestImage,
    NearestImages,
    summarize_nearest,
)

logger = logging.getLogger(__name__)
BATCH_SIZE = 4  # a constant: rounding depends on a batch's size


def prompt_seed(seed: int, prompt: str) -> int:
    """Return the seed of a prompt's image, in [0, 2^31)."""
    digest = hashlib.sha256(f"{seed}|{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError for typed prompts that could not be sampled: weights, Unicode."""
    for text in checks.texts("preview.prompts", list(prompts)) if prompts else ():
        try:
            parse_prompt(text)
        except ValueError as error:
            raise ValueError(f"preview.prompts: {error}") from None


def check_vae(vae: str, *, source: str) -> None:
    """Raise FileNotFoundError or ValueError where the VAE of the sheets does not open."""
    if vae:
        choose_vae(source, vae)


class PreviewPipeline(LatentDiffPipeline):
    """Generates from a condition that is encoded already, of any kind."""

    encoded = ConditionInputs()

    @property
    def _reads_mask(self) -> bool:
        return False  # image and mask are in the condition

    def _read_condition(self, *inputs: object, **others: object) -> ConditionInputs:
        return self.encoded


def make_pipeline(components: Components) -> LatentDiffPipeline:
    """Return a pipeline of the components, which are not copied."""
    return LatentDiffPipeline(**_arguments(components))


def make_preview_pipeline(
    components: Components, controlnet: ControlNetModel | None = None
) -> PreviewPipeline:
    """Return a pipeline of the components, which are not copied, for encoded conditions."""
    return PreviewPipeline(**_arguments(components), controlnet=controlnet)


def _arguments(components: Components) -> dict[str, Any]:
    has_checker = components.safety_checker is not None
    return components.as_dict() | {"requires_safety_checker": has_checker}


def image_guidance_scale(config: Config) -> float | None:
    """Return the scale of guidance by the image to edit, that of exports; None without one."""
    if config.condition_kind != "instruct_pix2pix":
        return None
    if config.preview.guidance_scale <= 1:  # there is none by the image without one by the prompt
        return 1.0
    return image_guidance(ModelInfo(condition_dropout=config.condition.dropout_share), None)


def preview_components(
    components: Components, *, vae: str, source: str, device: torch.device
) -> Components | None:
    """Return the components with the VAE that decodes the sheets; None where `vae` names none.

    vae: as `choose_vae` takes it, for a model at `source`, or a VAE there. Where the run scales the
    latents of that VAE anew, the other one's scale follows.
    """
    if not vae:
        return None
    chosen = choose_vae(source, vae).to(device).requires_grad_(False)
    scaled = LatentCodec(components.vae).scale / LatentCodec(load_vae(source)).scale
    set_scale(chosen, LatentCodec(chosen).scale * scaled)
    return replace(components, vae=chosen)


def write_sheet(
    components: Components,
    prompts: Sequence[str],
    path: Path,
    *,
    accelerator: Accelerator,
    seed: int,
    num_steps: int,
    guidance_scale: float,
    image_guidance: float | None = None,
    prompt_weighting: bool = False,
    nearest_images: NearestImages | None = None,
    conditions: Sequence[FixedCondition] = (),
    condition_kind: str = "none",
    condition_vae: Autoencoder | None = None,
    controlnet: ControlNetModel | None = None,
) -> dict[str, float]:
    """Generate one image a prompt and write them as a labelled PNG.

    conditions: one a prompt, of a model or ControlNet that reads them; each is shown before its
    image.
    condition_vae: the one that encoded them, by default the components'. image_guidance: the scale
    of guidance by an image to edit.
    prompt_weighting: of prompts that a person typed; False: captions, taken verbatim.
    nearest_images: adds the nearest training image of each. Returns their figures, on the main
    process. An error of one process is raised by all, so that none waits for another.
    """
    own: dict[int, Image.Image] = {}
    failure: Exception | None = None
    try:
        own = generate_share(
            components,
            prompts,
            accelerator=accelerator,
            seed=seed,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            image_guidance=image_guidance,
            prompt_weighting=prompt_weighting,
            conditions=conditions,
            controlnet=controlnet,
        )
    except Exception as error:
        failure = error
    if failures := gather_object([] if failure is None else [repr(failure)]):
        raise failure or RuntimeError(failures[0])
    generated = dict(gather_object(list(own.items())))
    if not accelerator.is_main_process:
        return {}
    images = [generated[index] for index in range(len(prompts))]
    found = _find_nearest(images, nearest_images)
    vae = condition_vae or components.vae
    shown = [shown_condition(vae, condition_kind, one.condition) for one in conditions]
    sheet, tiles = _sheet(images, prompts, found, shown)
    text = PngInfo()
    text.add_text(TILES, json.dumps(tiles))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=text)
    write_image_table(path.parent, [{"file_name": path.name, "text": " | ".join(prompts)}])
    logger.info("samples written: %s", path)
    return summarize_nearest(found) if found else {}


def _find_nearest(
    images: Sequence[Image.Image], nearest_images: NearestImages | None
) -> list[NearestImage]:
    """Find the nearest training images; one that can no longer be read is logged only."""
    try:
        return nearest_images.find(images) if nearest_images is not None else []
    except (OSError, ValueError) as error:
        logger.error("the nearest training images are not shown: %s", error)
        return []


def _sheet(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    found: Sequence[NearestImage],
    conditions: Sequence[Image.Image],
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Lay out images, each after its condition and before its nearest training image, if any.

    Returns the sheet and its tiles: {"label": a prompt, a file's name or "condition", "box":
    pixels, "is_nearest": whether it only accompanies a generated image}.
    """
    tiles: list[tuple[Image.Image, str, bool]] = []
    for k, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        if conditions:
            tiles.append((ImageOps.contain(conditions[k], image.size), "condition", True))
        tiles.append((image, prompt, False))
        if found:
            tiles.append((ImageOps.contain(found[k].image, image.size), found[k].label, True))
    each = len(tiles) // max(1, len(images))
    columns = min(8, len(prompts)) if each == 1 else each * min(8 // each, len(prompts))
    sheet = draw_grid([tile[0] for tile in tiles], [tile[1] for tile in tiles], columns=columns)
    return sheet, [
        {"label": label, "box": box, "is_nearest": accompanies}
        for (_, label, accompanies), box in zip(tiles, sheet.info[BOXES], strict=True)
    ]


@torch.no_grad()
def generate_share(
    components: Components,
    prompts: Sequence[str],
    *,
    accelerator: Accelerator,
    seed: int,
    num_steps: int,
    guidance_scale: float,
    image_guidance: float | None = None,
    prompt_weighting: bool = False,
    conditions: Sequence[FixedCondition] = (),
    controlnet: ControlNetModel | None = None,
    seeds: Sequence[int] | None = None,
) -> dict[int, Image.Image]:
    """Return this process's share of the prompts' images, by the prompt's index.

    conditions: one a prompt; each image is then generated alone. seeds: one a prompt, by default
    `prompt_seed`.
    """
    pipeline = make_preview_pipeline(components, controlnet if conditions else None)
    pipeline.set_progress_bar_config(disable=True)
    shard = accelerator.process_index, accelerator.num_processes
    generate = partial(
        generate_images,
        pipeline,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance,
        prompt_weighting=prompt_weighting,
    )
    seeds = seeds or [prompt_seed(seed, prompt) for prompt in prompts]
    own: dict[int, Image.Image] = {}
    with accelerator.autocast(), idle_parts_on(accelerator.device, components):
        if not conditions:
            num = batch_size(pipeline)
            batches = rank_batches(-(-len(prompts) // num), shard)
            return dict(generate(prompts, seeds=seeds, batch_size=num, pads=True, batches=batches))
        for k, counts in rank_batches(len(prompts), shard):
            pipeline.encoded = encoded(conditions[k], is_control=controlnet is not None)
            height, width = conditions[k].condition.shape[-2:]
            factor = 1 if controlnet is not None else pipeline.vae_scale_factor
            size = (factor * height, factor * width)
            ((_, image),) = generate([prompts[k]], seeds=[seeds[k]], batch_size=1, size=size)
            own |= {k: image} if counts else {}
    return own


def batch_size(pipeline: LatentDiffPipeline) -> int:
    """Return how many images of a sheet are made at once: large ones each alone."""
    height, width = trained_size_px(pipeline.unet, factor=pipeline.vae_scale_factor)
    return 1 if height * width > LARGE else BATCH_SIZE


def encoded(sample: FixedCondition, *, is_control: bool) -> EncodedCondition:
    """Return a condition (k, h, w), or a ControlNet's (3, H, W), as the pipeline reads it."""
    if is_control:
        return EncodedCondition(
            CONTROLNET, scales=(1.0,), fields={"control": sample.condition[None]}
        )
    fields = {"condition": sample.condition[None]}
    if sample.class_label is not None:
        fields["class_labels"] = sample.class_label.expand(1)
    return EncodedCondition(fields=fields)


def shown_condition(vae: Autoencoder, kind: str, condition: Tensor) -> Image.Image:
    """Show a condition (k, h, w), encoded by this VAE, as an image; a ControlNet's is one."""
    if kind == "controlnet":
        return to_pil(condition * 2 - 1)
    with torch.no_grad():
        pixels = condition_pixels(kind, LatentCodec(vae), condition[None].to(vae.device))
    return to_pil(pixels[0])
