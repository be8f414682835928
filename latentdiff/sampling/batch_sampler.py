"""Many images from one pipeline, batch by batch: the one loop over prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeAlias

import torch
from PIL import Image
from tqdm import tqdm

from latentdiff.pipeline.attention_maps import heat_map_grid, record_attention
from latentdiff.pipeline.callbacks import Trace
from latentdiff.pipeline.conditioning.prompt import parse_prompt
from latentdiff.pipeline.conditioning.sizes import SizeInputs
from latentdiff.pipeline.pipeline import LatentDiffPipeline
from latentdiff.sampling.open_pipeline import compile_unet
from latentdiff.sampling.prompt_list import ImageJob

Extras: TypeAlias = dict[str, Image.Image]
EXTRAS = ("trace", "attention")  # the kinds, where images are traced


def index_batches(
    num: int,
    *,
    batch_size: int,
    pads: bool = False,
    batches: Iterable[tuple[int, bool]] | None = None,
) -> Iterator[tuple[list[int], int]]:
    """Yield the indices of each batch of 0 .. num - 1, and how many of its results count.

    pads: repeat the last index of a batch that is too short. batches: (number, counts) of the
    batches to take, as `rank_batches` deals them out to processes; by default each once.
    """
    numbers = range(-(-num // batch_size))
    for number, counts in ((n, True) for n in numbers) if batches is None else batches:
        indices = list(range(num)[number * batch_size :][:batch_size])
        filled = indices + indices[-1:] * (batch_size - len(indices)) if pads else indices
        yield filled, len(indices) if counts else 0


def generate_images(
    pipe: LatentDiffPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    batch_size: int,
    num_inference_steps: int | None,
    guidance_scale: float,
    size: tuple[int, int] | None = None,
    prompt_weighting: bool = False,
    pads: bool = False,
    batches: Iterable[tuple[int, bool]] | None = None,
    desc: str = "",
    **others: Any,
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index, image) for each prompt with its seed, batch_size at a time.

    num_inference_steps: None for the model's own. size: (height, width) in pixels, by default the
    trained one. prompt_weighting: of prompts that a person typed; by default they are captions,
    which are taken verbatim. pads, batches: see `index_batches`. desc: of a progress bar over
    batches; empty: none. others: arguments of the pipeline's call, the same for all.
    """
    height, width = size or (None, None)
    work = list(index_batches(len(prompts), batch_size=batch_size, pads=pads, batches=batches))
    for indices, num_counted in tqdm(work, desc=desc, leave=False, disable=None if desc else True):
        images, _ = pipe(
            [prompts[k] for k in indices],
            seed=[seeds[k] for k in indices],
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            prompt_weighting=prompt_weighting,
            return_dict=False,
            **others,
        )
        yield from islice(zip(indices, images, strict=True), num_counted)


@dataclass(frozen=True)
class BatchSampler:
    """A pipeline with the arguments that all images of a list share."""

    pipe: LatentDiffPipeline
    arguments: dict[str, Any]
    batch_size: int
    is_traced: bool
    is_compiled: bool
    log: Callable[[str], None]

    def sample(self, jobs: Sequence[ImageJob]) -> Iterator[tuple[ImageJob, Image.Image, Extras]]:
        """Yield every job with its image and, when traced, its chain and heat maps."""
        work = list(self._batches(jobs))
        for number, (batch, num_counted) in enumerate(work):
            if self.is_compiled and number == 0:
                compile_unet(self.pipe, partial(self._warm_up, batch), log=self.log)
            yield from islice(self._sample_batch(batch), num_counted)

    def _batches(self, jobs: Sequence[ImageJob]) -> Iterator[tuple[list[ImageJob], int]]:
        """Yield neighbouring jobs that one call can make, and how many of them count."""
        groups = [list(group) for _, group in groupby(jobs, key=self._shared_settings)]
        size = min(self.batch_size, max(map(len, groups), default=1))
        for group in groups:  # compiled: in batches of one size, another one compiles anew
            for indices, num_counted in index_batches(
                len(group), batch_size=size, pads=self.is_compiled
            ):
                yield [group[k] for k in indices], num_counted

    def _sample_batch(
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
                prompt = parse_prompt(job.prompt, weighting=self.arguments["prompt_weighting"])
                extras["trace"] = trace.grid(self.pipe.vae, image=index)
                extras["attention"] = heat_map_grid(image, heat, tokenizer=words, prompt=prompt)
            yield job, image, extras

    def _warm_up(self, batch: Sequence[ImageJob]) -> None:
        """Take one step, at full strength where there is an image, so that a step is left."""
        strength = None if self.arguments["image"] is None else 1.0
        self._call(batch, None, num_inference_steps=1, strength=strength)

    def _call(self, batch: Sequence[ImageJob], trace: Trace | None, **changes: Any) -> Any:
        settings = self.arguments | {
            "num_inference_steps": batch[0].num_inference_steps,
            "guidance_scale": batch[0].guidance_scale,
        }
        negative: list[str] | None = [job.negative_prompt or "" for job in batch]
        if self.pipe.is_sdxl:
            settings |= _of_sdxl(batch)
            if batch[0].negative_prompt is None:
                negative = None  # which is not "" to SDXL
        try:
            return self.pipe(
                [job.prompt for job in batch],
                negative_prompt=negative,
                seed=[job.seed for job in batch],
                callback_on_step_end=trace,
                **settings | changes,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory with batch_size={self.batch_size}; lower it, height or width, or "
                f"take dtype=bfloat16 ({error})"
            ) from error

    def _shared_settings(self, job: ImageJob) -> tuple[int, float, bool, SizeInputs]:
        """Return what all images of one call have in common."""
        has_null = self.pipe.is_sdxl and job.negative_prompt is None
        return job.num_inference_steps, job.guidance_scale, has_null, job.sizes


def _of_sdxl(batch: Sequence[ImageJob]) -> dict[str, Any]:
    """Return a batch's arguments of SDXL; a text that is not given is that of the first encoder."""
    named: dict[str, Any] = dict(vars(batch[0].sizes))
    for name in ("prompt", "negative_prompt"):
        second = [getattr(job, f"{name}_2") for job in batch]
        if any(text is not None for text in second):
            pairs = zip(batch, second, strict=True)
            texts = [getattr(job, name) if text is None else text for job, text in pairs]
            named[f"{name}_2"] = texts
    return named
