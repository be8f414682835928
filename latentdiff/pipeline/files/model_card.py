"""The model card of a folder that goes to the hub: data, licence, steps, metrics, how to use it."""

from __future__ import annotations

import re

from huggingface_hub import ModelCardData

from latentdiff.pipeline.files.model_info import ModelInfo

UNKNOWN = "not recorded"


def model_card(facts: ModelInfo, *, name: str, default_steps: int = 30) -> str:
    """Return a model card in Markdown with its YAML head; what is not known is said to be so.

    name: of the model, a hub id or a folder's. Text from outside is escaped.
    """
    head = ModelCardData(
        license=facts.licence if facts.licence and _is_plain(facts.licence) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["latentdiff", "stable-diffusion-diffusers", "text-to-image"],
        datasets=[facts.dataset] if facts.dataset and _is_plain(facts.dataset) else None,
        base_model=facts.base_model if facts.base_model and _is_plain(facts.base_model) else None,
    )
    rows = [
        ("Base model", facts.base_model or "none: trained from scratch, or not recorded"),
        ("Training data", facts.dataset),
        ("Licence", facts.licence),
        ("Training steps", facts.steps),
        ("Resolution in pixels", facts.resolution),
        ("Prediction type", facts.prediction_type),
        ("Caption dropout", facts.caption_dropout),
    ]
    lines = [
        "---",
        head.to_yaml(),
        "---",
        "",
        f"# {_escaped(name)}",
        "",
        "A text-to-image latent diffusion model in Stable Diffusion's format, trained with "
        "LatentDiff.",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {_escaped(UNKNOWN if v is None else v)} |" for label, v in rows),
        "",
        "## Metrics",
        "",
        *_metrics(facts),
        "",
        "## Use",
        "",
        "```python",
        "from latentdiff import LatentDiffPipeline",
        "",
        f"pipe = LatentDiffPipeline.from_pretrained({_literal(name)})",
        f'pipe("a cat", num_inference_steps={default_steps}, seed=0).images[0].save("cat.png")',
        "```",
        "",
        "Plain `diffusers.StableDiffusionPipeline` opens it too.",
        "",
        "## Limits",
        "",
        "It draws what its training data shows, with that data's gaps and biases, and may repeat "
        "training images.",
        "",
    ]
    return "\n".join(lines)


def _metrics(facts: ModelInfo) -> list[str]:
    if not facts.metrics:
        return [f"{UNKNOWN.capitalize()}."]
    rows = [f"| {_escaped(key)} | {_escaped(value)} |" for key, value in facts.metrics.items()]
    return ["| metric | value |", "|---|---|", *rows]


def _is_plain(text: str) -> bool:
    """Say whether a text can stand as an id in the card's head: no path, no markup."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None


def _literal(text: str) -> str:
    return '"' + re.sub(r'["\\`\s]', "_", text) + '"'


def _escaped(value: object) -> str:
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", text)
