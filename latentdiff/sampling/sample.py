"""Many images from one command: a sheet, or a folder of images that can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from latentdiff.config.sampling import SampleOptions
from latentdiff.image_grid import draw_grid
from latentdiff.pipeline import checks
from latentdiff.pipeline.attention_maps import heat_map_grid, record_attention
from latentdiff.pipeline.callbacks import Trace
from latentdiff.pipeline.files.model_info import default_guidance
from latentdiff.pipeline.pipeline import LatentDiffPipeline
from latentdiff.pipeline.png_metadata import (
    attach_settings,
    model_metadata,
    read_settings,
    save_png,
)
from latentdiff.sampling.open_pipeline import compile_unet, open_pipeline
from latentdiff.sampling.prompt_list import (
    ImageJob,
    PromptEntry,
    job_batches,
    plan_jobs,
    read_prompt_entries,
)

logger = logging.getLogger(__name__)

COLUMNS = 4

Extras: TypeAlias = dict[str, Image.Image]


@dataclass(frozen=True)
class BatchSampler:
    """A pipeline with the arguments that all images of a list share."""

    pipe: LatentDiffPipeline
    arguments: dict[str, Any]
    batch_size: int
    is_traced: bool
    is_compiled: bool
    log: Callable[[str], None]

    def draw(self, jobs: Sequence[ImageJob]) -> Iterator[tuple[ImageJob, Image.Image, Extras]]:
        """Yield every job with its image and, when traced, its chain and heat maps."""
        work = list(job_batches(jobs, batch_size=self.batch_size))
        size = max(map(len, work), default=0) if self.is_compiled else 0
        for place, batch in enumerate(work):
            filled = [*batch, *[batch[-1]] * (size - len(batch))]  # another size compiles anew
            if self.is_compiled and place == 0:
                compile_unet(self.pipe, partial(self._warm_up, filled), log=self.log)
            yield from islice(self._draw_batch(filled), len(batch))

    def _draw_batch(
        self, batch: Sequence[ImageJob]
    ) -> Iterator[tuple[ImageJob, Image.Image, Extras]]:
        trace = Trace() if self.is_traced else None
        recording = record_attention(self.pipe.unet, num_images=len(batch))
        with recording if self.is_traced else nullcontext() as maps:
            result = self._call(batch, trace)
        for index, (job, image) in enumerate(zip(batch, result.images, strict=True)):
            extras: Extras = {}
            if trace is not None and maps is not None:
                heat, words = maps.mean()[index], self.pipe.tokenizer
                extras["trace"] = trace.grid(self.pipe.vae, image=index)
                extras["attention"] = heat_map_grid(image, heat, tokenizer=words, prompt=job.prompt)
            yield job, image, extras

    def _warm_up(self, batch: Sequence[ImageJob]) -> None:
        """Take one step; an image to start from is made anew, so that there is one."""
        strength = None if self.arguments["image"] is None else 1.0
        self._call(batch, None, num_inference_steps=1, strength=strength)

    def _call(self, batch: Sequence[ImageJob], trace: Trace | None, **changes: Any) -> Any:
        settings = self.arguments | {
            "num_inference_steps": batch[0].num_inference_steps,
            "guidance_scale": batch[0].guidance_scale,
        }
        try:
            return self.pipe(
                [job.prompt for job in batch],
                negative_prompt=[job.negative_prompt or "" for job in batch],
                seed=[job.seed for job in batch],
                callback_on_step_end=trace,
                **settings | changes,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory with batch_size={self.batch_size}; lower it, height or width, or "
                f"take dtype=bfloat16 ({error})"
            ) from error


def sample(
    model: str,
    prompts: Sequence[str],
    options: SampleOptions,
    *,
    log: Callable[[str], None] = logger.info,
) -> Iterator[dict[str, Any]]:
    """Make the images; yield a JSON object for each file when it is written.

    log: gets a line before steps that take minutes.

    Raises ValueError or OSError with one clear message for bad input, and never writes over a
    image that has other settings.
    """
    out = Path(options.out)
    if out.suffix and out.suffix.lower() != ".png":
        raise ValueError(f"out={options.out} must be a .png file, or a folder")
    if options.compile and options.trace:
        raise ValueError("trace reads each attention, which compiled code hides: leave one out")
    lines = _lines(prompts, options)
    _jobs(lines, options, guidance_scale=1.0)  # refuses bad input before the model is opened
    batch_size = checks.count("batch_size", options.batch_size, maximum=checks.MAX_IMAGES)
    arguments, pipe = _arguments(options), _load(model, options)
    jobs = _jobs(lines, options, guidance_scale=default_guidance(pipe.model_info))
    painter = BatchSampler(pipe, arguments, batch_size, options.trace, options.compile, log)
    if out.suffix:
        is_grid = len(jobs) > len({(job.row, job.seed) for job in jobs})
        columns = len(_list(options.guidance_scale)) * options.num_images if is_grid else COLUMNS
        yield from _sample_grid(painter, jobs, out, columns=columns)
    else:
        yield from _sample_folder(painter, jobs, out)


def _sample_grid(
    painter: BatchSampler, jobs: Sequence[ImageJob], out: Path, *, columns: int
) -> Iterator[dict[str, Any]]:
    images = []
    for job, image, extras in painter.draw(jobs):
        images.append(image)
        yield from _write_extras(extras, out.with_name(f"{out.stem}.{job.number:06d}.png"))
    sheet = draw_grid(images, [_label(job, jobs) for job in jobs], columns=columns)
    attach_settings(sheet, [read_settings(image) for image in images])
    yield {"path": str(save_png(sheet, out)), "kind": "sheet", "images": len(images)}


def _sample_folder(
    painter: BatchSampler, jobs: Sequence[ImageJob], folder: Path
) -> Iterator[dict[str, Any]]:
    """Make the images that the folder lacks."""
    mark = model_metadata(painter.pipe)
    missing = [job for job in jobs if not _is_done(folder / _name(job), job, mark)]
    for job, image, extras in painter.draw(missing):
        path = save_png(image, folder / _name(job))
        yield {"path": str(path), "kind": "image", **read_settings(image)["call"]}
        yield from _write_extras(extras, path)
    counts = {"made": len(missing), "images": len(jobs)}
    yield {"path": str(folder), "kind": "folder", **counts}


def _write_extras(extras: Extras, beside: Path) -> Iterator[dict[str, Any]]:
    for kind, image in extras.items():
        path = save_png(image, beside.with_name(f"{beside.stem}.{kind}.png"))
        yield {"path": str(path), "kind": kind}


def _is_done(path: Path, job: ImageJob, mark: dict[str, Any]) -> bool:
    """Say whether a job's image is there; ValueError where another one has its name."""
    if not path.exists():
        return False
    settings = read_settings(path)
    found, wanted = settings["call"], _own(job)
    different = sorted(key for key, value in wanted.items() if found.get(key) != value)
    if settings["model"]["fingerprint"] != mark["fingerprint"]:
        has, takes = (str(one["dtype"]).removeprefix("torch.") for one in (settings["model"], mark))
        different.append("model" if has == takes else f"dtype, --dtype {has}")
    if different:
        raise ValueError(
            f"{path} is an image of another {', '.join(different)}; it is not written over, "
            "choose another folder"
        )
    return True


def _own(job: ImageJob) -> dict[str, Any]:
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt or "",
        "seed": job.seed,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
    }


def _name(job: ImageJob) -> str:
    return f"{job.number:06d}.png"


def _label(job: ImageJob, jobs: Sequence[ImageJob]) -> str:
    """Return the prompt, and what differs between the images of a grid."""
    parts = [job.prompt]
    if len({one.num_inference_steps for one in jobs}) > 1:
        parts.append(f"steps {job.num_inference_steps}")
    if len({one.guidance_scale for one in jobs}) > 1:
        parts.append(f"guidance {job.guidance_scale:g}")
    return " | ".join(parts)


def _lines(prompts: Sequence[str], options: SampleOptions) -> list[PromptEntry]:
    lines = [PromptEntry(prompt) for prompt in prompts]
    if options.prompt_file is not None:
        lines += read_prompt_entries(Path(options.prompt_file))
    if not lines:
        raise ValueError("no prompts; give some, or prompt_file")
    return lines


def _jobs(
    lines: Sequence[PromptEntry], options: SampleOptions, *, guidance_scale: float
) -> list[ImageJob]:
    """Plan the images; guidance_scale: where the options name none."""
    scales = options.guidance_scale
    return plan_jobs(
        lines,
        seed=options.seed,
        negative_prompt=options.negative_prompt,
        steps=_list(options.steps),
        guidance_scales=[guidance_scale] if scales is None else [float(s) for s in _list(scales)],
        num_images=checks.count("num_images", options.num_images, maximum=checks.MAX_IMAGES),
    )


def sample_each(
    pipe: LatentDiffPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    at_once: int,
    desc: str = "",
) -> list[Image.Image]:
    """Draw each prompt from the seed at its place, `at_once` together.

    desc: of a progress bar; empty: none.
    """
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), at_once), desc=desc, leave=False, disable=not desc):
        part = slice(start, start + at_once)
        made, _ = pipe(
            list(prompts[part]),
            seed=list(seeds[part]),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            return_dict=False,
        )
        images += made
    return images


def _load(model: str, options: SampleOptions) -> LatentDiffPipeline:
    pipe = open_pipeline(
        model,
        dtype=options.dtype,
        device=options.device,
        fast=options.fast,
    )
    if options.sampler is not None:
        pipe.set_scheduler(options.sampler)
    if options.lora is not None:
        pipe.load_lora_weights(options.lora)
    pipe.set_progress_bar_config(leave=False)
    return pipe


def _arguments(options: SampleOptions) -> dict[str, Any]:
    """Return the arguments of a call that all images share."""
    interval = options.guidance_interval
    return {
        "height": options.height,
        "width": options.width,
        "image": _open("image", options.image),
        "mask_image": _open("mask", options.mask),
        "strength": options.strength,
        "guidance_rescale": options.guidance_rescale,
        "guidance_interval": None if interval is None else tuple(interval),
        "long_prompts": options.long_prompts,
        "lora_scale": options.lora_scale,
    }


def _open(name: str, path: str | None) -> Image.Image | None:
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, SyntaxError, OSError) as error:
        raise ValueError(f"{name} {path} is not a readable image: {error}") from error


def _list(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("steps and guidance_scale need at least one value")
    return values
