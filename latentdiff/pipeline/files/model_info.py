"""A model's origin, kept in its folder as `latentdiff.json`, and the model card made of it.

Plain JSON that other programs may ignore. Training writes it; the pipeline warns from it; the card
is the README.md of a folder that goes to the hub: data, licence, steps, metrics, use.
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

from huggingface_hub import ModelCardData

from latentdiff.atomic import write_text
from latentdiff.models.compatibility import CONDITION_KINDS

FILE_NAME = "latentdiff.json"
OUTPUTS = ("pipeline", "pipeline_learned_variance", "lora")  # of a run
FLOW_HINT = (  # no entry of a single file tells ComfyUI so
    "a model of rectified flow: put the node ModelSamplingSD3 with shift 1 between the checkpoint "
    "and the sampler"
)
UNKNOWN = "not recorded"  # in a card
NUM_STEPS = 50  # sampling steps of a call that gives none, as in diffusers
GUIDANCE_SCALE = 7.5  # of a model that does not name one, as in diffusers
SDXL_GUIDANCE_SCALE = 5.0  # as stock pipelines

CARD_SUMMARY = "A text-to-image latent diffusion model in Stable Diffusion's format"
CARD = """---
{head}
---

# {name}

{summary}, made with LatentDiff.

## Training

| | |
|---|---|
{rows}

## Metrics

{metrics}

## Use

```python
from latentdiff import LatentDiffPipeline

pipe = LatentDiffPipeline.from_pretrained({literal})
pipe("a cat", num_inference_steps={steps}, seed=0).images[0].save("cat.png")
```

Plain `diffusers.StableDiffusionPipeline` opens it too.

## Limits

Its images show its training data's subjects, gaps and biases, and may repeat \
training images.
"""

ADAPTER_CARD = """---
{head}
---

# {name}

A {noun} for {base}, made with LatentDiff.

| | |
|---|---|
{rows}

## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base_literal})
pipe.{load}({literal})
pipe({prompt}).images[0].save("image.png")
```
"""
LOADING = {"LoRA": "load_lora_weights", "embedding": "load_textual_inversion"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """How a model was trained; None where that is not known.

    caption_dropout: part of the captions replaced by the empty one in the last training, 0 for
    none at all; base_caption_dropout: the most in any training of the base model before. dataset,
    steps: of the last training, optimiser steps. loras: name to weight of those merged in since.
    metrics: name to value, with sample counts where they are estimates. guidance_scale:
    of a call that gives none. num_inference_steps: of a model that is distilled to so few;
    guidance_range: the lowest and highest guidance scale that it learned, which its U-Net reads, or
    where is_guided, holds in its weights, so that guidance in a call would be applied twice.
    clip_skip: layers of the text encoder that captions skipped. condition_kind: of the image that
    the U-Net reads, a name of compatibility.CONDITION_KINDS; condition_dropout: part of the
    images that was dropped, which guidance by the image needs. example_prompts: what the model
    knows how to draw.
    """

    caption_dropout: float | None = None
    base_caption_dropout: float | None = None
    prediction_type: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    licence: str | None = None
    steps: int | None = None
    resolution: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    guidance_range: Sequence[float] = ()
    is_guided: bool | None = None
    clip_skip: int | None = None
    condition_kind: str | None = None
    condition_dropout: float | None = None
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
        resolution=info.resolution,
        guidance_scale=info.guidance_scale,
        num_inference_steps=info.num_inference_steps,
        guidance_range=info.guidance_range,
        is_guided=info.is_guided,
        clip_skip=info.clip_skip,
        condition_kind=info.condition_kind,
        condition_dropout=info.condition_dropout,
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


def folder_title(folder: str | os.PathLike[str]) -> str:
    """Return the title of a model's card in a folder, there already or not: its public name."""
    return public_name(os.path.abspath(folder))


def _published(info: ModelInfo) -> ModelInfo:
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
    fields_of = asdict(_published(info)).items()
    return {name: value for name, value in fields_of if value not in (None, {}, ())}


def model_card(info: ModelInfo, *, name: str, default_num_steps: int = 30) -> str:
    """Return a model card in Markdown with its YAML head; unknown fields read "not recorded".

    name: of the model, a hub id or a folder's. Text from outside is escaped.
    """
    info = _published(info)
    from_scratch = "none: trained from scratch" if info.steps is not None else None
    rows: list[tuple[str, object]] = [
        ("Base model", info.base_model or from_scratch),
        *_last_training(info),
        ("Licence", info.licence),
        ("Resolution in pixels", info.resolution),
        ("Prediction type", info.prediction_type),
    ]
    if info.prediction_type == "flow_prediction":
        rows.append(("In ComfyUI", FLOW_HINT))
    if info.num_inference_steps:
        rows.append(("Distilled to sampling steps", info.num_inference_steps))
    if info.guidance_range:
        place = "in the weights: sample without guidance" if info.is_guided else "an input"
        rows.append(("Guidance scale", f"{scales_text(info)}, {place}"))
    if info.clip_skip:
        named = f"{info.clip_skip}, as diffusers counts; in A1111 {info.clip_skip + 1}"
        rows.append(("Clip skip", named))
    if kind := CONDITION_KINDS.get(info.condition_kind or ""):
        rows.append(("Image condition", f"{info.condition_kind}: {kind.reads}"))
    if info.base_model:
        rows.append(("Caption dropout of the base model", info.base_caption_dropout))
    shown = [(label, _escaped(UNKNOWN if value is None else value)) for label, value in rows]
    return CARD.format(
        head=_card_head(info).to_yaml(),
        name=_escaped(name),
        summary=CARD_SUMMARY,
        rows="\n".join(f"| {label} | {value} |" for label, value in shown),
        metrics="\n".join(_metrics(info)),
        literal=_literal(name),
        steps=default_steps(info, default_num_steps),
    )


def adapter_card(info: ModelInfo, *, name: str, noun: str, trigger: str = "") -> str:
    """Return the card of a "LoRA" or an "embedding"; info: of the run's model.

    trigger: words that call for what was learned, if any.
    """
    info = _published(info)
    base = info.base_model
    rows: list[tuple[str, object]] = [
        ("Trigger words", trigger or "none"),
        ("Base model", base),
        *_last_training(info),
        ("Licence", info.licence),
        ("Resolution in pixels", info.resolution),
    ]
    shown = [(label, _escaped(UNKNOWN if value is None else value)) for label, value in rows]
    head = _card_head(info, tag="lora" if noun == "LoRA" else "textual_inversion")
    head["instance_prompt"] = trigger or None
    return ADAPTER_CARD.format(
        head=head.to_yaml(),
        name=_escaped(name),
        noun=noun,
        base=_escaped(base or "a Stable Diffusion model"),
        rows="\n".join(f"| {label} | {value} |" for label, value in shown),
        base_literal=_literal(base or "base_model"),
        load=LOADING[noun],
        literal=_literal(name),
        prompt=json.dumps(trigger or "a cat"),
    )


def _last_training(info: ModelInfo) -> list[tuple[str, object]]:
    """Return the rows of a card that tell how the model came from its base model."""
    if info.loras:
        loras = [f"{name} x {weight:g}" for name, weight in info.loras.items()]
        return [("LoRAs merged in", ", ".join(loras))]
    return [
        ("Training data", info.dataset),
        ("Training steps", info.steps),
        ("Caption dropout", info.caption_dropout),
    ]


def _card_head(info: ModelInfo, *, tag: str | None = None) -> ModelCardData:
    base = info.base_model
    return ModelCardData(
        license=info.licence if info.licence and _is_plain(info.licence) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["latentdiff", "stable-diffusion-diffusers", "text-to-image", *([tag] if tag else [])],
        datasets=[info.dataset] if info.dataset and _is_plain(info.dataset) else None,
        base_model=base if base and "/" in base and _is_plain(base) else None,  # hub ids alone
        widget=[{"text": prompt} for prompt in info.example_prompts] or None,
    )


def _metrics(info: ModelInfo) -> list[str]:
    if not info.metrics:
        return [f"{UNKNOWN.capitalize()}."]
    rows = [f"| {_escaped(key)} | {_escaped(value)} |" for key, value in info.metrics.items()]
    return ["| metric | value |", "|---|---|", *rows]


def _is_plain(text: str) -> bool:
    """Return whether a text can be an id in the card's head: no path, no markup."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None


def _literal(name: str) -> str:
    """Return the argument that opens a model, as Python; only hub ids are one as they are."""
    text = name if "/" in name else f"path/to/{name}"
    return '"' + re.sub(r'["\\`\s]', "_", text) + '"'


def _escaped(value: object) -> str:
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", text)
