"""The model card made of a model's info: the README.md of a folder that goes to the hub.

It states base model, data, licence, steps, metrics and use. Does not answer for: what is recorded
(model_info.py).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from huggingface_hub import ModelCardData

from latentdiff.models.compatibility import CONDITION_KINDS, CONTROLNET, read_json
from latentdiff.models.model_path import INDEX
from latentdiff.pipeline.files.model_info import (
    UNKNOWN,
    ModelInfo,
    default_steps,
    public_name,
    published,
    scales_text,
)
from latentdiff.pipeline.files.prediction_marks import comfyui_node
from latentdiff.pipeline.files.stock_format import OURS, stock_class

BILL_ROOT = "Root of its bill of materials"
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
pipe({given}, num_inference_steps={steps}, seed=0).images[0].save("cat.png")
```

{opened_by}## Limits

Its images show its training data's subjects, gaps and biases, and may repeat \
training images.
"""

GIVEN = {  # arguments of a call in the card of a kind, a PIL image each
    "none": '"a cat"',
    "inpaint": '"a cat", image=image, mask_image=mask',
    "instruct_pix2pix": '"make it red", condition=image',
    "upscale": '"a cat", condition=low_resolution_image',
    "depth": '"a cat", condition=depth_map',
    CONTROLNET: '"a cat", condition=image',
}
NOTES = {  # on diffusers' pipeline of a kind
    "upscale": ", with the same images: the scale of the latents is in the VAE's weights",
    "depth": "; its depth estimator is a stand-in of random weights, so pass `depth_map`",
}

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


def folder_title(folder: str | os.PathLike[str]) -> str:
    """Return the title of a model's card in a folder, there already or not: its public name."""
    return public_name(os.path.abspath(folder))


def bill_root_in(card: str) -> str:
    """Return the root of the bill of materials that a card states, "" where it states none."""
    found = re.search(rf"^\| {BILL_ROOT} \| ([0-9a-f]{{64}}) \|$", card, re.MULTILINE)
    return found[1] if found else ""


def model_card(
    info: ModelInfo,
    *,
    name: str,
    stock: str | None = None,
    default_num_steps: int = 30,
    bill_root: str = "",
) -> str:
    """Return a model card in Markdown with its YAML head; unknown fields read "not recorded".

    name: of the model, a hub id or a folder's. stock: diffusers' class that opens it, by default
    that of its kind of Stable Diffusion 1.x. bill_root: of its bill of materials, if it has one.
    Text from outside is escaped.
    """
    info = published(info)
    from_scratch = "none: trained from scratch" if info.steps is not None else None
    rows: list[tuple[str, object]] = [
        ("Base model", info.base_model or from_scratch),
        *_last_training(info),
        ("Licence", info.licence),
        ("Resolution in pixels", info.resolution),
        ("Prediction type", info.prediction_type),
    ]
    if info.prediction_type == "flow_prediction":  # no entry of a single file tells ComfyUI so
        settings = {"prediction_type": info.prediction_type, "flow_shift": info.flow_shift}
        node = comfyui_node(settings, is_sdxl=True)  # of any kind of model
        what = "a model of rectified flow: put"
        rows.append(("In ComfyUI", f"{what} {node} between the checkpoint and the sampler"))
    rows += _of_sampling(info)
    kind = info.condition_kind or "none"
    if kind in CONDITION_KINDS:
        rows.append(("Image condition", f"{kind}: {CONDITION_KINDS[kind].reads}"))
    if info.base_model:
        rows.append(("Caption dropout of the base model", info.base_caption_dropout))
    if bill_root:
        rows.append((BILL_ROOT, bill_root))
    shown = [(label, _escaped(UNKNOWN if value is None else value)) for label, value in rows]
    return CARD.format(
        head=_card_head(info).to_yaml(),
        name=_escaped(name),
        summary=CARD_SUMMARY,
        rows="\n".join(f"| {label} | {value} |" for label, value in shown),
        metrics="\n".join(_metrics(info)),
        literal=_literal(name),
        steps=default_steps(info, default_num_steps),
        given=GIVEN.get(kind, GIVEN["none"]),
        opened_by=_opened_by(stock or stock_class(kind, is_sdxl=False), kind),
    )


def _of_sampling(info: ModelInfo) -> list[tuple[str, object]]:
    """Return the rows of a card that tell how a model is to be sampled."""
    rows: list[tuple[str, object]] = []
    if info.num_inference_steps:
        rows.append(("Distilled to sampling steps", info.num_inference_steps))
    if info.guidance_range:
        place = "in the weights: sample without guidance" if info.is_guided else "an input"
        rows.append(("Guidance scale", f"{scales_text(info)}, {place}"))
    if info.clip_skip:
        named = f"{info.clip_skip}, as diffusers counts; in A1111 {info.clip_skip + 1}"
        rows.append(("Clip skip", named))
    return rows


def class_of_folder(folder: Path) -> str:
    """Return the class that a model's folder names in its model_index.json."""
    return str(read_json(folder / INDEX)["_class_name"])


def _opened_by(stock: str, kind: str) -> str:
    """Return a paragraph on the class of diffusers that opens a model; empty where none does."""
    if stock == OURS:
        return ""
    return f"Plain `diffusers.{stock}` opens it too{NOTES.get(kind, '')}.\n\n"


def adapter_card(info: ModelInfo, *, name: str, noun: str, trigger: str = "") -> str:
    """Return the card of a "LoRA" or an "embedding"; info: of the run's model.

    trigger: words that call for what was learned, if any.
    """
    info = published(info)
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
    rows: list[tuple[str, object]] = [
        ("Training data", info.dataset),
        ("Training steps", info.steps),
        ("Images per step", info.batch_size),
        ("Caption dropout", info.caption_dropout),
    ]
    if info.condition_kind == "instruct_pix2pix":
        rows.append(("Condition dropout", info.condition_dropout))
        if untrained := untrained_guidance(info.null_caption_dropout, info.condition_dropout):
            rows.append(("Guidance", untrained))
    return rows


def untrained_guidance(caption_dropout: float | None, condition_dropout: float | None) -> str:
    """Return which guidance an instruct_pix2pix model has not learned; empty for none.

    caption_dropout, condition_dropout: shares of samples; None for unknown ones.
    """
    if condition_dropout == 0:
        return (
            "no image was dropped (condition.dropout=0): leave image_guidance_scale at 1, as there "
            "is no prediction without the image to guide from"
        )
    if caption_dropout == 0:
        return (
            "no caption was dropped (diffusion.caption_dropout=0): leave guidance_scale and "
            "image_guidance_scale at 1, as there is no prediction without caption to guide from"
        )
    return ""


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
