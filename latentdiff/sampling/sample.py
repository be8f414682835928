"""The sample command: a labelled grid, or a folder of images that can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.config.options import SampleOptions
from latentdiff.image_grid import draw_grid
from latentdiff.image_io import ImageError, decode_image
from latentdiff.pipeline import checks
from latentdiff.pipeline.conditioning.sizes import SizeInputs
from latentdiff.pipeline.files.model_info import NUM_STEPS, default_guidance, default_steps
from latentdiff.pipeline.pipeline import LatentDiffPipeline
from latentdiff.pipeline.png_metadata import (
    TINY_VAE,
    attach_settings,
    read_image_settings,
    read_settings,
    save_png,
)
from latentdiff.pipeline.schedulers import scheduler_name
from latentdiff.sampling.batch_sampler import EXTRAS, BatchSampler, Extras
from latentdiff.sampling.open_pipeline import open_pipeline
from latentdiff.sampling.prompt_list import (
    ImageJob,
    PromptEntry,
    plan_jobs,
    read_prompt_entries,
)
from latentdiff.sampling.resume_folder import ResumeFolder, write_image_table

logger = logging.getLogger(__name__)

COLUMNS = 4


def sample(
    model: str,
    prompts: Sequence[str],
    options: SampleOptions,
    *,
    log: Callable[[str], None] = logger.info,
) -> Iterator[dict[str, Any]]:
    """Make the images; yield a JSON object for each file when it is written.

    log: gets a line before steps that take minutes. Raises ValueError or OSError with one clear
    message for bad input, and never writes over an image that has other settings.
    """
    out = Path(options.out).expanduser()
    if out.suffix and out.suffix.lower() != ".png":
        raise ValueError(f"out={options.out} must be a .png file, or a folder")
    if options.compile and options.trace:
        raise ValueError("trace reads each attention, which compiled code hides: leave one out")
    if options.trace and options.window_size is not None:
        raise ValueError("trace shows one canvas, which windows divide: leave out one of the two")
    entries = _prompt_entries(prompts, options)
    _jobs(
        entries, options, guidance_scale=1.0, num_steps=1
    )  # refuses bad input before the model is opened
    batch_size = checks.count("batch_size", options.batch_size, maximum=checks.MAX_IMAGES)
    arguments, pipe = _arguments(options), _load(model, options)
    _check_conditions(options, num_controlnets=len(pipe.controlnets))
    jobs = _jobs(
        entries,
        options,
        guidance_scale=default_guidance(pipe.model_info, is_sdxl=pipe.is_sdxl),
        num_steps=default_steps(pipe.model_info, NUM_STEPS),
    )
    _check_second_texts(entries, options, is_sdxl=pipe.is_sdxl)
    sampler = BatchSampler(pipe, arguments, batch_size, options.trace, options.compile, log)
    if out.suffix:
        is_grid = len(jobs) > len({(job.row, job.seed) for job in jobs})
        columns = len(_list(options.guidance_scale)) * options.num_images if is_grid else COLUMNS
        yield from _sample_grid(sampler, jobs, out, columns=columns)
    else:
        yield from _sample_folder(sampler, jobs, out)


OPTIONS = (  # of the command that are arguments of the call under the same name
    *("num_inference_steps", "guidance_scale", "seed", "negative_prompt", "height", "width"),
    *("guidance_rescale", "guidance_interval", "long_prompts", "prompt_weighting", "clip_skip"),
    *("lora_scale", "image_guidance_scale", "noise_level", "controlnet_conditioning_scale"),
    *("window_size", "window_overlap", "prompt_2", "negative_prompt_2"),
    *(field.name for field in fields(SizeInputs)),
)


def options_from_image(
    path: str, *, has_image: bool, has_condition: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """Return the prompts and options of a PNG file's settings; a sheet's may be of one image only.

    has_image, has_condition: an image to start from is given, so that the file's strength counts,
    or one that the model reads. Warns of what the options cannot give again: LoRAs, images,
    ControlNets, and a scheduler without a name here.
    """
    settings = read_settings(Path(path).expanduser())
    if isinstance(settings, list) and len(settings) == 1:
        settings = settings[0]
    elif isinstance(settings, list):
        raise ValueError(f"settings_from={path} is a sheet of {len(settings)} images, expected one")
    call = settings.get("call")
    if not isinstance(call, dict) or not isinstance(call.get("prompt"), str):
        raise ValueError(f"settings_from={path} states no prompt")
    names = (*OPTIONS, *(["strength", "padding_mask_crop", "keep_unmasked"] if has_image else []))
    options = {name: call[name] for name in names if name in call}
    if isinstance(scheduler := settings.get("scheduler"), dict):
        if name := scheduler_name(scheduler):
            options["scheduler"] = name
        else:
            label = scheduler.get("name", scheduler.get("class"))
            logger.warning("%s: no scheduler %s here, the model's own is taken", path, label)
    inputs = settings.get("inputs")
    if isinstance(inputs, dict) and "condition" in inputs and not has_condition:
        is_control = "controlnet_conditioning_scale" in call
        more = ", and its ControlNet by --controlnet" if is_control else ""
        logger.warning("%s was made of an image; give it by --condition%s", path, more)
    model = settings.get("model")
    if isinstance(model, dict) and model.get("vae") == TINY_VAE:
        logger.warning("%s was decoded by a tiny VAE; give it by --vae", path)
    if loras := settings.get("loras"):
        logger.warning("%s was made with the LoRAs %s; give them by --lora", path, ", ".join(loras))
    return [call["prompt"]], options


def _sample_grid(
    sampler: BatchSampler, jobs: Sequence[ImageJob], out: Path, *, columns: int
) -> Iterator[dict[str, Any]]:
    images = []
    for job, image, extras in sampler.sample(jobs):
        images.append(image)
        yield from _write_extras(extras, out.with_name(f"{out.stem}.{job.number:06d}.png"))
    sheet = draw_grid(images, [_label(job, jobs) for job in jobs], columns=columns)
    attach_settings(sheet, [read_settings(image) for image in images])
    yield {"path": str(save_png(sheet, out)), "kind": "sheet", "images": len(images)}


def _sample_folder(
    sampler: BatchSampler, jobs: Sequence[ImageJob], folder: Path
) -> Iterator[dict[str, Any]]:
    """Make the images that the folder lacks."""
    made = ResumeFolder(sampler.pipe, sampler.arguments)
    missing = [
        job
        for job in jobs
        if not made.is_done(folder / _name(job), job)
        or (sampler.is_traced and not _has_extras(folder / _name(job)))
    ]
    for job, image, extras in sampler.sample(missing):
        path = save_png(image, folder / _name(job))
        yield {"path": str(path), "kind": "image", **read_image_settings(image)["call"]}
        yield from _write_extras(extras, path)
    write_image_table(folder, (_row(job) for job in jobs))
    counts = {"made": len(missing), "images": len(jobs)}
    yield {"path": str(folder), "kind": "folder", **counts}


def _row(job: ImageJob) -> dict[str, Any]:
    return {
        "file_name": _name(job),
        "text": job.prompt,
        "negative_prompt": job.negative_prompt or "",
        "seed": job.seed,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
    }


def _has_extras(image_path: Path) -> bool:
    return all(image_path.with_name(f"{image_path.stem}.{kind}.png").exists() for kind in EXTRAS)


def _write_extras(extras: Extras, image_path: Path) -> Iterator[dict[str, Any]]:
    for kind, image in extras.items():
        path = save_png(image, image_path.with_name(f"{image_path.stem}.{kind}.png"))
        yield {"path": str(path), "kind": kind}


def _name(job: ImageJob) -> str:
    return f"{job.number:06d}.png"


def _label(job: ImageJob, jobs: Sequence[ImageJob]) -> str:
    """Return the prompt, and the settings that differ between the images of a grid."""
    parts = [job.prompt]
    if len({one.num_inference_steps for one in jobs}) > 1:
        parts.append(f"steps {job.num_inference_steps}")
    if len({one.guidance_scale for one in jobs}) > 1:
        parts.append(f"guidance {job.guidance_scale:g}")
    return " | ".join(parts)


def _prompt_entries(prompts: Sequence[str], options: SampleOptions) -> list[PromptEntry]:
    entries = [PromptEntry(prompt) for prompt in prompts]
    if options.prompt_file is not None:
        entries += read_prompt_entries(Path(options.prompt_file).expanduser())
    if not entries:
        raise ValueError("no prompts; give some, or prompt_file")
    if not all(entry.prompt.strip() for entry in entries):
        logger.warning("the prompt is empty: an image of no prompt")
    return [_with_defaults(entry, options) for entry in entries]


def _with_defaults(entry: PromptEntry, options: SampleOptions) -> PromptEntry:
    """Return an entry with the options of SDXL where it has none of its own."""
    own = {name: size for name, size in vars(entry.sizes).items() if size is not None}
    given = {field.name: getattr(options, field.name) for field in fields(SizeInputs)} | own
    texts = {
        name: getattr(options if getattr(entry, name) is None else entry, name)
        for name in ("prompt_2", "negative_prompt_2")
    }
    return replace(entry, **texts, sizes=SizeInputs(**given).checked(is_sdxl=True))


def _jobs(
    entries: Sequence[PromptEntry],
    options: SampleOptions,
    *,
    guidance_scale: float,
    num_steps: int,
) -> list[ImageJob]:
    """Plan the images; guidance_scale, num_steps: where the options name none."""
    scales, steps = options.guidance_scale, options.num_inference_steps
    return plan_jobs(
        entries,
        seed=options.seed,
        negative_prompt=options.negative_prompt,
        steps=[num_steps] if steps is None else _list(steps),
        guidance_scales=[guidance_scale] if scales is None else [float(s) for s in _list(scales)],
        num_images=checks.count("num_images", options.num_images, maximum=checks.MAX_IMAGES),
    )


def _load(model: str, options: SampleOptions) -> LatentDiffPipeline:
    pipe = open_pipeline(
        model,
        dtype=options.dtype,
        device=options.device,
        fast=options.fast,
        safety_checker=options.safety_checker,
        vae=options.vae,
    )
    if options.scheduler is not None:
        pipe.set_scheduler(options.scheduler)
    if controlnets := _paths(options.controlnet):
        pipe.load_controlnet(controlnets)
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    if options.lora is not None:
        pipe.load_lora_weights(Path(options.lora).expanduser())
    pipe.set_progress_bar_config(leave=False)
    return pipe


def _arguments(options: SampleOptions) -> dict[str, Any]:
    """Return the arguments of a call that all images share."""
    interval = options.guidance_interval
    conditions = [_open("condition", path) for path in _paths(options.condition)]
    return {
        "condition": conditions if len(conditions) > 1 else (*conditions, None)[0],
        "image_guidance_scale": options.image_guidance_scale,
        "noise_level": options.noise_level,
        "controlnet_conditioning_scale": options.controlnet_conditioning_scale,
        "window_size": options.window_size,
        "window_overlap": options.window_overlap,
        "height": options.height,
        "width": options.width,
        "image": _open("image", options.image),
        "mask_image": _open("mask", options.mask),
        "strength": options.strength,
        "padding_mask_crop": options.padding_mask_crop,
        "keep_unmasked": options.keep_unmasked,
        "guidance_rescale": options.guidance_rescale,
        "guidance_interval": None if interval is None else tuple(interval),
        "long_prompts": options.long_prompts,
        "prompt_weighting": options.prompt_weighting,
        "clip_skip": options.clip_skip,
        "lora_scale": options.lora_scale,
    }


def _check_conditions(options: SampleOptions, *, num_controlnets: int) -> None:
    """Raise ValueError for several conditions that are not one a ControlNet."""
    num, expected = len(_paths(options.condition)), max(1, num_controlnets)
    if num not in (0, expected):
        raise ValueError(
            f"condition names {num} images, expected "
            f"{expected if num_controlnets else 'one for all prompts'}"
            f"{', one for each ControlNet' if num_controlnets > 1 else ''}"
        )


def _check_second_texts(
    entries: Sequence[PromptEntry], options: SampleOptions, *, is_sdxl: bool
) -> None:
    """Raise ValueError for what SDXL alone reads, or a second negative prompt without a first."""
    for entry in entries:
        entry.sizes.checked(is_sdxl=is_sdxl)
        for name in ("prompt_2", "negative_prompt_2"):
            if getattr(entry, name) is not None and not is_sdxl:
                raise ValueError(
                    f"{name} is read by SDXL alone, and this model is not SDXL; leave it out"
                )
        negatives = entry.negative_prompt, options.negative_prompt
        if entry.negative_prompt_2 is not None and negatives == (None, None):
            raise ValueError("negative_prompt_2 needs negative_prompt; pass both or the latter")


def _open(name: str, path: str | None) -> Image.Image | None:
    if path is None:
        return None
    try:
        return decode_image(Path(path).expanduser())
    except (ImageError, OSError) as error:
        raise ValueError(f"{name} {path} is not a readable image: {error}") from error


def _paths(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _list(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("num_inference_steps and guidance_scale need at least one value")
    return values
