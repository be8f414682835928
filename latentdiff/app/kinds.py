"""The kinds of images that the page makes: from text, from an image, into a part of an image, and
by models that read an image.

Each is a tab with inputs of its own above the settings that all share. A new kind is an entry in
KINDS and whatever fields it adds to ImageRequest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from latentdiff.app.image_request import (
    CONDITION,
    CONDITION_RANGES,
    CONTROL_SCALE,
    IMAGE,
    INPAINT,
    RANGES,
    TEXT,
    ImageRequest,
)
from latentdiff.app.library import NO_CONTROLNET
from latentdiff.data.edges import draw_edges
from latentdiff.pipeline.files.model_info import DEFAULT_NOISE_LEVEL, IMAGE_GUIDANCE_SCALE

STRENGTH, INPAINT_STRENGTH, CONTROL_WEIGHT = 0.8, 1.0, 1.0
MASK_COLOR = (255, 59, 107)
EDITOR_PX, BRUSH_PX = 512, 48


@dataclass(frozen=True)
class Kind:
    """A kind of image, its controls and what they say.

    layout: lays out the controls that this kind alone has, by name. read: their values -> fields
    of the request. fill: a request -> their values. names: the control of a field, where it is
    not of the field's own name.
    """

    name: str
    label: str
    layout: Callable[[], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    fill: Callable[[ImageRequest], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)

    def control_of(self, name: str) -> str:
        """Return the name of the control that states a field of the request."""
        return self.names.get(name, name)


def painted_mask(value: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Return an image editor's image and the mask painted over it; None without."""
    if not value or value.get("background") is None:
        return None, None
    background: Image.Image = value["background"]
    painted = np.zeros(background.size[::-1], dtype=np.uint8)
    for layer in value.get("layers") or []:
        opaque = np.asarray(layer.convert("RGBA").resize(background.size))[..., 3]
        painted = np.maximum(painted, opaque)
    if not painted.any():
        return background, None
    return background, Image.fromarray(np.where(painted > 0, 255, 0).astype(np.uint8))


def painting_of(image: Image.Image, mask: Image.Image | None) -> dict[str, Any]:
    """Return an image editor's value: the image, and the mask painted over it.

    A small image is enlarged by a whole factor, as a brush is some pixels of the image wide.
    """
    factor = max(1, EDITOR_PX // max(image.size))
    size = image.width * factor, image.height * factor
    background = image.convert("RGBA").resize(size, Image.Resampling.NEAREST)
    layer = Image.new("RGBA", background.size)
    if mask is not None:
        layer.paste((*MASK_COLOR, 255), mask=mask.convert("L").resize(background.size))
    composite = Image.alpha_composite(background, layer)
    return {"background": background, "layers": [layer], "composite": composite}


def _image_input(label: str, elem_id: str) -> gr.Image:
    return gr.Image(
        type="pil",
        format="png",
        label=label,
        sources=["upload", "clipboard"],
        height=260,
        elem_id=elem_id,
        buttons=[],
    )


def _image_layout() -> dict[str, Any]:
    image = _image_input("Start image", "start-image")
    return {"start_image": image, "image_strength": _strength(STRENGTH, "image-strength")}


def _inpaint_layout() -> dict[str, Any]:
    editor = gr.ImageEditor(
        type="pil",
        format="png",
        label="Image, and mask painted over it",
        sources=["upload", "clipboard"],
        brush=gr.Brush(
            colors=["#" + bytes(MASK_COLOR).hex()], color_mode="fixed", default_size=BRUSH_PX
        ),
        transforms=(),
        layers=False,
        height=380,
        elem_id="painting",
        buttons=[],
    )
    strength = _strength(INPAINT_STRENGTH, "inpaint-strength")
    info = "Paste the painted part into the image; off: the model makes all of it anew"
    keeps = gr.Checkbox(True, label="Keep all other pixels", info=info, elem_id="keep-unmasked")
    return {"painting": editor, "inpaint_strength": strength, "keep_unmasked": keeps}


def _condition_layout() -> dict[str, Any]:
    image = _image_input("Image that the model reads", "condition")
    with gr.Row(elem_id="controlnet-row"):
        net = gr.Dropdown(
            [NO_CONTROLNET],
            value=NO_CONTROLNET,
            label="ControlNet",
            info="What it was trained on: a layout, edges, ...",
            elem_id="controlnet",
        )
        scale = gr.Slider(
            *(*CONDITION_RANGES[CONTROL_SCALE], CONTROL_WEIGHT),
            step=0.05,
            label="ControlNet weight",
            info="How much of it is added",
            elem_id="control-scale",
        )
    edges = gr.Button("Take the image's edges", size="sm", elem_id="take-edges")
    edges.click(_edges_of, image, image, show_progress="hidden")
    low, high = CONDITION_RANGES["image_guidance_scale"]
    guidance = gr.Slider(
        *(low, high, IMAGE_GUIDANCE_SCALE),
        step=0.1,
        label="Image guidance",
        info="Models that edit: how near to the image, 1 is off",
        elem_id="image-guidance",
    )
    low, high = CONDITION_RANGES["noise_level"]
    level = gr.Slider(
        *(low, high, DEFAULT_NOISE_LEVEL),
        step=1,
        label="Noise level",
        info="Super-resolution: more makes more of it anew",
        elem_id="noise-level",
    )
    shown = {"image_guidance_scale": guidance, "noise_level": level}
    return {"condition": image, "controlnet": net, CONTROL_SCALE: scale, **shown}


def _edges_of(image: Image.Image | None) -> Image.Image | None:
    """Return the edges of an image, as a ControlNet of edges reads them."""
    return None if image is None else draw_edges(image)


def _read_condition(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "condition": values["condition"],
        "image_guidance_scale": float(values["image_guidance_scale"]),
        "noise_level": int(values["noise_level"]),
        "controlnet": values["controlnet"],
        CONTROL_SCALE: float(values[CONTROL_SCALE]),
    }


def _fill_condition(request: ImageRequest) -> dict[str, Any]:
    scale, level = request.image_guidance_scale, request.noise_level
    weight = request.controlnet_conditioning_scale
    return {
        "condition": request.condition,
        "image_guidance_scale": IMAGE_GUIDANCE_SCALE if scale is None else scale,
        "noise_level": DEFAULT_NOISE_LEVEL if level is None else level,
        "controlnet": request.controlnet,
        CONTROL_SCALE: CONTROL_WEIGHT if weight is None else weight,
    }


def _strength(value: float, elem_id: str) -> Any:
    low, high = RANGES["strength"]
    return gr.Slider(
        low,
        high,
        value,
        step=0.05,
        label="Strength",
        info="How much is made anew: low keeps the image, 1 replaces it",
        elem_id=elem_id,
    )


def _read_image(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": values["start_image"], "strength": values["image_strength"]}


def _fill_image(request: ImageRequest) -> dict[str, Any]:
    strength = STRENGTH if request.strength is None else request.strength
    return {"start_image": request.image, "image_strength": strength}


def _read_inpaint(values: Mapping[str, Any]) -> dict[str, Any]:
    image, mask = painted_mask(values["painting"])
    keeps = values["keep_unmasked"]
    given = {"strength": values["inpaint_strength"], "keep_unmasked": keeps}
    return {"image": image, "mask_image": mask, **given}


def _fill_inpaint(request: ImageRequest) -> dict[str, Any]:
    strength = INPAINT_STRENGTH if request.strength is None else request.strength
    image = request.image
    painting = None if image is None else painting_of(image, request.mask_image)
    keeps = request.keep_unmasked is not False
    return {"painting": painting, "inpaint_strength": strength, "keep_unmasked": keeps}


KINDS = {
    kind.name: kind
    for kind in (
        Kind(TEXT, "Text to image", dict, lambda values: {}, lambda request: {}),
        Kind(
            IMAGE,
            "Image to image",
            _image_layout,
            _read_image,
            _fill_image,
            {"image": "start_image", "strength": "image_strength"},
        ),
        Kind(
            INPAINT,
            "Inpaint",
            _inpaint_layout,
            _read_inpaint,
            _fill_inpaint,
            {"image": "painting", "strength": "inpaint_strength"},
        ),
        Kind(CONDITION, "Condition", _condition_layout, _read_condition, _fill_condition),
    )
}
