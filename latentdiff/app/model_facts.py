"""What the page tells of the model that is open: name, subjects, size, training, examples.

From the model card (README.md), `latentdiff.json` and the networks' configs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from latentdiff.diffusion.windows import place_windows
from latentdiff.models.compatibility import CONDITION_KINDS, size_in_reach
from latentdiff.models.model_path import resolve_model
from latentdiff.models.text import clip_skip_of
from latentdiff.pipeline.conditioning.canvas import trained_size_px
from latentdiff.pipeline.files.model_card import CARD_SUMMARY
from latentdiff.pipeline.files.model_info import (
    IMAGE_GUIDANCE_SCALE,
    MAX_NOISE_LEVEL,
    NUM_STEPS,
    ModelInfo,
    default_guidance,
    default_steps,
    image_guidance,
    scales_text,
)
from latentdiff.pipeline.pipeline import LatentDiffPipeline
from latentdiff.pipeline.schedulers import make_scheduler, scheduler_names

OWN_SCHEDULER = OWN_VAE = OWN_CONTROLNET = "the model's own"
TINY = "tiny"  # the name of a fast VAE of the same latents
REACH, REACH_IN_WINDOWS = 2, 8  # times the trained size, where the page's sizes end
MAX_SUMMARY = 300  # characters
EXAMPLES = (  # for a model that names none
    "a photograph of a cat on a sofa",
    "a watercolour of mountains at dawn",
    "a bowl of fruit, oil painting",
    "a red bicycle in front of a white wall",
)


@dataclass(frozen=True)
class ModelFacts:
    """Facts of one model. height, width: in pixels, as trained; multiple: of its sizes.

    max_side_px, max_windowed_px: of a side, in one pass of the U-Net and in windows.
    condition_kind: of the image that its U-Net reads; max_noise_level, image_guidance_scale: how
    noisy that may be, and how strongly it guides by default, 1 where it cannot. is_sdxl: reads
    second prompts and sizes. is_distilled: a step is one pass at any guidance.
    """

    name: str
    height: int
    width: int
    multiple: int
    max_side_px: int
    max_windowed_px: int
    guidance_scale: float
    num_inference_steps: int
    schedulers: tuple[str, ...]
    clip_skip: int
    max_clip_skip: int
    examples: tuple[str, ...]
    vaes: tuple[str, ...] = (OWN_VAE,)
    condition_kind: str = "none"
    max_noise_level: int = MAX_NOISE_LEVEL
    image_guidance_scale: float = IMAGE_GUIDANCE_SCALE
    is_sdxl: bool = False
    is_distilled: bool = False
    summary: str = ""
    rows: tuple[tuple[str, str], ...] = ()

    @property
    def window_px(self) -> int:
        """The side of the windows of a larger image: the trained one."""
        return min(self.height, self.width)

    def max_side(self, *, in_windows: bool) -> int:
        """Return the longest side of an image in pixels."""
        return self.max_windowed_px if in_windows else self.max_side_px

    def windows_note(self, width: int, height: int, *, overlap: float) -> str:
        """Return a sentence on the cost of an image in windows, "" where one holds it all."""
        if max(width, height) <= self.window_px:
            return ""
        size = height // self.multiple, width // self.multiple
        num = len(place_windows(size, self.window_px // self.multiple, overlap=overlap))
        return f"{num} windows of {self.window_px} px: each step takes {num} passes of the U-Net"

    def size_warning(self, width: int, height: int) -> str:
        """Return a sentence on a size far beyond the trained one, "" for any other."""
        trained = self.height, self.width
        better = size_in_reach(height, width, trained=trained, multiple=self.multiple)
        if better is None:
            return ""
        return (
            f"{self.name} was trained at {self.width} x {self.height} pixels; at {width} x "
            f"{height} subjects repeat and parts come apart. Better: {better[1]} x {better[0]}"
        )

    def size_of_condition(
        self, width: int, height: int, *, in_windows: bool = False
    ) -> tuple[int, int]:
        """Return the (width, height) of the image for a condition: an upscaler's is larger.

        In the condition's proportions, where it is too large for the page.
        """
        if self.condition_kind != "upscale":
            return self.size_for(width, height)
        side = self.max_side(in_windows=in_windows) // self.multiple
        scale = min(1, side / max(width, height))
        found = [max(1, int(one * scale)) * self.multiple for one in (width, height)]
        return found[0], found[1]

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) of about the trained area that has an image's proportions."""
        scale = (self.width * self.height / (width * height)) ** 0.5
        sides = (round(side * scale / self.multiple) * self.multiple for side in (width, height))
        found = [min(max(side, self.multiple), self.max_side_px) for side in sides]
        return found[0], found[1]


def read_model_facts(
    pipe: LatentDiffPipeline, *, name: str, path: str, max_px: int, has_tiny_vae: bool = False
) -> ModelFacts:
    """Return the facts of an open model. path: it was opened from; max_px: of a side at most."""
    factor, folder = pipe.vae_scale_factor, resolve_model(path)
    height, width = trained_size_px(pipe.unet, factor=factor)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    layers = 1 if pipe.text_encoder is None else pipe.text_encoder.config.num_hidden_layers
    info, kind = pipe.model_info, pipe.condition_kind
    reach, reach_in_windows = (
        max(min(times * max(height, width), max_px // factor * factor), factor)
        for times in (REACH, REACH_IN_WINDOWS)
    )
    return ModelFacts(
        name=name,
        height=height,
        width=width,
        multiple=factor,
        max_side_px=reach,
        max_windowed_px=reach_in_windows,
        guidance_scale=default_guidance(info, is_sdxl=pipe.is_sdxl),
        num_inference_steps=default_steps(info, NUM_STEPS),
        schedulers=(OWN_SCHEDULER, *_fitting_schedulers(pipe)),
        clip_skip=clip_skip_of(pipe.text_encoder),
        max_clip_skip=layers - 1,
        examples=tuple(info.example_prompts) or EXAMPLES,
        vaes=(OWN_VAE, TINY) if has_tiny_vae and kind != "instruct_pix2pix" else (OWN_VAE,),
        condition_kind=kind,
        max_noise_level=MAX_NOISE_LEVEL if info.max_noise_level is None else info.max_noise_level,
        image_guidance_scale=image_guidance(info, None),
        is_sdxl=pipe.is_sdxl,
        is_distilled=bool(info.num_inference_steps),
        summary=card_summary(text),
        rows=tuple(_rows(pipe, info, size=(width, height))),
    )


def card_summary(card: str) -> str:
    """Return the first paragraph under a model card's title, "" where it says nothing."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", text):
        plain = " ".join(re.sub(r"!?\[([^\]]*)\]\([^)]*\)|[*_`]", r"\1", paragraph).split())
        if re.match(r"[A-Z0-9]", plain):
            is_known = plain.startswith(CARD_SUMMARY)
            return "" if is_known else plain[:MAX_SUMMARY] + "..." * (len(plain) > MAX_SUMMARY)
    return ""


def _rows(
    pipe: LatentDiffPipeline, info: ModelInfo, *, size: tuple[int, int]
) -> list[tuple[str, str]]:
    """Return labels and values; what is not known is absent."""
    parts = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2, pipe.vae)
    parameters = sum(p.numel() for part in parts if part is not None for p in part.parameters())
    found = {
        "Size": f"{size[0]} x {size[1]} px",
        "Trained on": Path(info.dataset).name if info.dataset else None,
        "Training steps": f"{info.steps:,}" if info.steps else None,
        "Base model": info.base_model,
        "Guidance": f"{default_guidance(info, is_sdxl=pipe.is_sdxl):g}",
        "Distilled": _distilled(info),
        "Parameters": f"{parameters / 1e6:,.3g} M",
        "Reads": reads.reads if (reads := CONDITION_KINDS.get(pipe.condition_kind)) else None,
        "Prediction type": info.prediction_type,
        "Licence": info.licence,
    }
    return [(label, str(value)) for label, value in found.items() if value is not None]


def _distilled(info: ModelInfo) -> str | None:
    """Return what a distilled model is to be used with, None of any other."""
    if not info.num_inference_steps:
        return None
    place = "in its weights" if info.is_guided else "learned"
    scales = f"guidance of {scales_text(info)} {place}, " if info.guidance_range else ""
    return f"to {info.num_inference_steps} steps, {scales}negative prompt without effect"


def _fitting_schedulers(pipe: LatentDiffPipeline) -> list[str]:
    """Return the names of the schedulers that can do the noise this model was trained with."""
    found = []
    for name in scheduler_names():
        try:
            make_scheduler(name, trained=pipe.scheduler)
        except ValueError:
            continue
        found.append(name)
    return found
