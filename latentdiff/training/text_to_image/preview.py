"""Sample sheets during a run: fixed prompts, each with its own seed, and their nearest images.

A prompt's seed depends on the run's seed and the prompt alone, so adding a prompt does not change
the others' images. The prompts are shared out over the processes in batches of one size, so that
neither does the number of processes. Captions are taken verbatim, as in training; prompts that a
person typed may weigh words.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from latentdiff.atomic import atomic_file
from latentdiff.evaluation.metrics.heldout_loss import rank_batches
from latentdiff.image_grid import BOXES, TILES, draw_grid
from latentdiff.models.components import Components
from latentdiff.pipeline import LatentDiffPipeline, checks
from latentdiff.pipeline.prompts import parse_prompt
from latentdiff.sampling.batch_sampler import generate_images
from latentdiff.sampling.resume_folder import write_image_table
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


def make_pipeline(components: Components) -> LatentDiffPipeline:
    """Return a pipeline of the components, which are not copied."""
    parts = components.as_dict()
    return LatentDiffPipeline(
        **parts, requires_safety_checker=components.safety_checker is not None
    )


def write_sheet(
    components: Components,
    prompts: Sequence[str],
    path: Path,
    *,
    accelerator: Accelerator,
    seed: int,
    num_steps: int,
    guidance_scale: float,
    prompt_weighting: bool = False,
    nearest_images: NearestImages | None = None,
) -> dict[str, float]:
    """Generate one image a prompt and write them as a labelled PNG.

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
            prompt_weighting=prompt_weighting,
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
    sheet, tiles = _sheet(images, prompts, found)
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
    images: Sequence[Image.Image], prompts: Sequence[str], found: Sequence[NearestImage]
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Lay out images, each followed by its nearest training image; return the sheet and its tiles.

    A tile is {"label": a prompt or a file's name, "box": pixels, "is_nearest": bool}.
    """
    tiles, labels = list(images), list(prompts)
    columns = min(8, len(prompts))
    if found:
        tiles, labels, columns = [], [], 2 * min(4, len(prompts))
    for image, prompt, one in zip(images, prompts, found, strict=True) if found else ():
        tiles += [image, ImageOps.contain(one.image, image.size)]
        labels += [prompt, one.label]
    sheet = draw_grid(tiles, labels, columns=columns)
    return sheet, [
        {"label": label, "box": box, "is_nearest": bool(found) and k % 2 == 1}
        for k, (label, box) in enumerate(zip(labels, sheet.info[BOXES], strict=True))
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
    prompt_weighting: bool = False,
) -> dict[int, Image.Image]:
    """Return this process's share of the prompts' images, by the prompt's index."""
    pipeline = make_pipeline(components)
    pipeline.set_progress_bar_config(disable=True)
    shard = accelerator.process_index, accelerator.num_processes
    images = generate_images(
        pipeline,
        prompts,
        seeds=[prompt_seed(seed, prompt) for prompt in prompts],
        batch_size=BATCH_SIZE,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        prompt_weighting=prompt_weighting,
        pads=True,
        batches=rank_batches(-(-len(prompts) // BATCH_SIZE), shard),
    )
    with accelerator.autocast():
        return dict(images)
