"""A model's origin, kept in its folder as `latentdiff.json`.

Plain JSON that other programs may ignore. Training writes it; the pipeline warns from it;
model_card.py makes the card of it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from latentdiff.atomic import write_text
from latentdiff.models.model_path import INFO_FILE

FILE_NAME = INFO_FILE
BILL_KEY = "latentdiff.bill_of_materials"  # in the metadata of safetensors files
BILL_NAME = "bill_of_materials.json"  # next to a model's files
CONTENT_NAME = "training_content.md"  # the summary of what it was trained on
OUTPUTS = ("pipeline", "pipeline_learned_variance", "lora")  # of a run
UNKNOWN = "not recorded"  # of a value, for a person
NUM_STEPS = 50  # sampling steps of a call that gives none, as in diffusers
GUIDANCE_SCALE = 7.5  # of a model that does not name one, as in diffusers
SDXL_GUIDANCE_SCALE = 5.0  # as stock pipelines
IMAGE_GUIDANCE_SCALE = 1.5  # of a model that edits images, as in diffusers
DEFAULT_NOISE_LEVEL, MAX_NOISE_LEVEL = 20, 350  # of images in low resolution, as in diffusers


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """How a model was trained; None where that is not known.

    caption_dropout: part of the captions replaced by the empty one in the last training, 0 for
    none at all; base_caption_dropout: the most in any training of the base model before. dataset,
    steps, batch_size: of the last training, optimiser steps and images of each. loras: name to
    weight of those merged in since.
    flow_shift: of the sigmas of rectified flow, None where it is 1. metrics: name to value, with
    sample counts where they are estimates. guidance_scale: of a call that gives none.
    num_inference_steps: of a model that is distilled to so few; guidance_range: the lowest and
    highest guidance scale that it learned, which its U-Net reads, or where is_guided, holds in its
    weights, so that guidance in a call would be applied twice.
    clip_skip: layers of the text encoder that captions skipped. condition_kind: of the image that
    the U-Net reads, a name of compatibility.CONDITION_KINDS; condition_dropout: part of the
    images that was dropped, which guidance by the image needs; max_noise_level: of the images in
    low resolution that it learned from. example_prompts: what the model
    knows how to draw.
    """

    caption_dropout: float | None = None
    base_caption_dropout: float | None = None
    prediction_type: str | None = None
    flow_shift: float | None = None
    base_model: str | None = None
    dataset: str | None = None
    licence: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    resolution: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    guidance_range: Sequence[float] = ()
    is_guided: bool | None = None
    clip_skip: int | None = None
    condition_kind: str | None = None
    condition_dropout: float | None = None
    max_noise_level: int | None = None
    loras: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    example_prompts: Sequence[str] = ()

    @property
    def null_caption_dropout(self) -> float | None:
        """The most caption dropout in any training, None where that is not known.

        What a base model learned of the empty caption stays in those tuned from it.
        """
        if self.base_model is None:
            return self.caption_dropout
        known = [self.caption_dropout or None, self.base_caption_dropout]
        return max((one for one in known if one is not None), default=None)


def read_model_info(folder: str | os.PathLike[str]) -> ModelInfo:
    """Read a folder's `latentdiff.json`; all fields are None where it has no such file.

    Entries of other programs or versions are ignored. Raises ValueError for a broken file.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return ModelInfo()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; delete or fix the file") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(entries).__name__}")
    return info_from_json(entries)


def info_from_json(entries: Mapping[str, Any]) -> ModelInfo:
    """Return the info that JSON entries state; those of other programs or versions are ignored."""
    known = {one.name for one in fields(ModelInfo)}
    info = ModelInfo(**{name: value for name, value in entries.items() if name in known})
    lists = tuple(info.example_prompts), tuple(info.guidance_range)
    return replace(info, example_prompts=lists[0], guidance_range=lists[1])


def merged_info(
    info: ModelInfo, base_model: str, *, loras: Mapping[str, float], prediction_type: str
) -> ModelInfo:
    """Return what is known of a model with LoRAs merged in. info: of the base model."""
    return ModelInfo(
        base_model=base_model,
        base_caption_dropout=info.null_caption_dropout,
        prediction_type=prediction_type,
        flow_shift=info.flow_shift,
        resolution=info.resolution,
        guidance_scale=info.guidance_scale,
        num_inference_steps=info.num_inference_steps,
        guidance_range=info.guidance_range,
        is_guided=info.is_guided,
        clip_skip=info.clip_skip,
        condition_kind=info.condition_kind,
        condition_dropout=info.condition_dropout,
        max_noise_level=info.max_noise_level,
        loras=loras,
    )


def default_guidance(info: ModelInfo, *, is_sdxl: bool = False) -> float:
    """Return the guidance scale of a call that gives none: the model's own, else 7.5, SDXL's 5.

    A distilled model takes the nearest that it learned, or 1 where its weights hold the guidance.
    """
    if info.is_guided:
        return 1.0
    scale = info.guidance_scale
    if scale is None:
        scale = SDXL_GUIDANCE_SCALE if is_sdxl else GUIDANCE_SCALE
    low, high = info.guidance_range or (scale, scale)
    return min(max(scale, low), high)


def image_guidance(info: ModelInfo, scale: float | None) -> float:
    """Return the scale of guidance by the image to edit, by default 1.5, or 1 where it has none.

    ValueError where it is asked of a model that never lost its image in training.
    """
    has_none = info.condition_dropout == 0
    if scale is None:
        return 1.0 if has_none else IMAGE_GUIDANCE_SCALE
    if has_none and scale > 1:
        raise ValueError(
            f"image_guidance_scale is {scale:g}, but this model was trained with "
            "condition.dropout=0 and has no prediction without the image to guide from; leave it "
            "out, or train with condition.dropout=0.1"
        )
    return scale


def default_steps(info: ModelInfo, otherwise: int) -> int:
    """Return the sampling steps to recommend: a distilled model's own, else these."""
    return info.num_inference_steps or otherwise


def warn_if_guidance_untrained(info: ModelInfo, scale: float) -> None:
    """Warn where guidance is asked of a model that never saw the empty caption."""
    if scale > 1 and info.null_caption_dropout == 0:
        logger.warning(
            "guidance_scale is %g, but this model was trained without caption dropout and has no "
            "unconditional prediction to guide from; use guidance_scale=1",
            scale,
        )


def warn_of_distillation(
    info: ModelInfo, *, scale: float, num_steps: int, reads_scale: bool, has_negative: bool
) -> None:
    """Warn of arguments of a call for which a distilled model has no use.

    scale, num_steps: of the call. reads_scale: the U-Net reads the guidance scale as an input.
    has_negative: a negative prompt is given.
    """
    steps, (low, high) = info.num_inference_steps, info.guidance_range or (scale, scale)
    if info.is_guided and scale > 1:
        logger.warning(
            "guidance_scale is %g, but this model is distilled with guidance (%s) in its weights, "
            "so it is applied twice; use guidance_scale=1",
            *(scale, scales_text(info)),
        )
    elif reads_scale and not low <= scale <= high:
        logger.warning(
            "guidance_scale is %g, but this model is distilled for scales of %s",
            *(scale, scales_text(info)),
        )
    if has_negative and (reads_scale or (info.is_guided and scale <= 1)):
        logger.warning(
            "negative_prompt has no effect: this model is distilled to predict with guidance in "
            "one pass, without an unconditional prediction"
        )
    if steps and num_steps > steps:
        logger.warning(
            "num_inference_steps is %d, but this model is distilled to %d; more do not make "
            "better images",
            *(num_steps, steps),
        )


def scales_text(info: ModelInfo) -> str:
    """Return the guidance scales of a distilled model for a person, such as "1 to 8"."""
    return " to ".join(dict.fromkeys(f"{scale:g}" for scale in info.guidance_range)) or UNKNOWN


def public_name(model: str) -> str:
    """Name a model without its place on this machine, as everything that may leave it does.

    A hub id, or the name of a model that ships, stays as it is; of a path only the last part is
    left, or for RUN/pipeline and RUN/lora the run's.
    """
    is_path = re.match(r"[/~.\\]|[A-Za-z]:[\\/]", model) or model.count("/") > 1
    if "://" in model or not (is_path or "\\" in model or Path(model).exists()):
        return model
    parts = [part for part in re.split(r"[\\/]+", os.path.abspath(model)) if part]
    if len(parts) > 1 and parts[-1] in OUTPUTS:
        parts.pop()
    return parts[-1] if parts else ""


def published(info: ModelInfo) -> ModelInfo:
    """Return the info without paths of this machine."""
    base, dataset = info.base_model, info.dataset
    return replace(
        info,
        base_model=public_name(base) if base else None,
        dataset=public_name(dataset) if dataset else None,
    )


def write_model_info(folder: str | os.PathLike[str], info: ModelInfo) -> Path:
    """Write the known fields to the folder's `latentdiff.json`, atomically; return the path.

    A base model or data set that is a path is named without its place (public_name).
    """
    path = Path(folder) / FILE_NAME
    write_text(path, json.dumps(info_to_json(info), indent=2, ensure_ascii=False) + "\n")
    return path


def info_to_json(info: ModelInfo) -> dict[str, Any]:
    """Return the known fields as JSON entries, without paths of this machine."""
    fields_of = asdict(published(info)).items()
    return {name: value for name, value in fields_of if value not in (None, {}, ())}
