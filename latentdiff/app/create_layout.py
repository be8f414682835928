"""The layout of the tab that makes images: what to draw, the result, the settings, the history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from latentdiff.app.image_request import (
    CONTROL_SCALE,
    DEFAULTS,
    LONG_PROMPTS,
    MAX_CHARACTERS,
    MAX_IMAGES,
    MAX_STEPS,
    RANGES,
    TEXT,
)
from latentdiff.app.kinds import KINDS
from latentdiff.app.library import NO_LORA
from latentdiff.app.model_facts import OWN_SCHEDULER, OWN_VAE
from latentdiff.app.page_html import images_html, note_html, status_html

SIZES_NOTE = (
    "What the model is told of the image's sizes, width x height in pixels. A small original size "
    "asks for a blurred image, a corner above 0 for a cropped subject."
)
SIZE_LABELS = {  # of what SDXL is told, and what it is told by default
    "original_size": ("original size", "the image's"),
    "crops_coords_top_left": ("crop corner", "left x top: 0 x 0"),
    "target_size": ("target size", "the image's"),
}


@dataclass
class CreateControls:
    """The components of the tab. controls: those that state a request, by name."""

    controls: dict[str, Any] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)  # controls that are fields of ImageRequest
    facts: Any = None
    kinds: Any = None
    examples: Any = None
    generate: Any = None
    stop: Any = None
    status: Any = None
    images: Any = None
    parameters: Any = None
    selected: Any = None
    fitted: Any = None
    again: Any = None
    use_again: Any = None
    to_image: Any = None
    to_inpaint: Any = None
    history: Any = None
    size_note: Any = None
    refresh: Any = None
    png: Any = None
    png_note: Any = None
    of_sdxl: Any = None  # shown for SDXL alone

    def of_model(self) -> list[Any]:
        """Return the components that change with the model."""
        sampling = ("num_inference_steps", "guidance_scale", "scheduler", "vae", "clip_skip")
        conditional = ("image_guidance_scale", "noise_level", "controlnet", CONTROL_SCALE)
        names = ("width", "height", "windows", *sampling, *conditional)
        others = [self.facts, self.examples, self.size_note, self.of_sdxl]
        return [*others, *(self.controls[n] for n in names)]

    def of_image(self) -> list[Any]:
        """Return the components that change with the image that is shown."""
        return [self.images, self.selected, self.parameters, self.again]

    def add(self, name: str, control: Any) -> Any:
        """Take a control that is a field of ImageRequest."""
        self.controls[name] = control
        self.shared.append(name)
        return control


def lay_out(model: Any, facts: Any) -> CreateControls:
    """Lay out the tab. model: the page's choice of a model, a control too; facts: on it."""
    ui = CreateControls(facts=facts)
    ui.add("model", model)
    ui.selected, ui.fitted = gr.State(""), gr.State(None)
    with gr.Row(elem_id="create"):
        with gr.Column(elem_id="ask"):
            _lay_out_prompt(ui)
        with gr.Column(elem_id="result"):
            _lay_out_result(ui)
        with gr.Column(elem_id="settings"):
            _lay_out_settings(ui)
    return ui


def _lay_out_prompt(ui: CreateControls) -> None:
    kind = ui.add("kind", gr.Textbox(TEXT, visible="hidden", label="Kind"))
    with gr.Tabs(elem_id="kinds", selected=TEXT, overflow_behavior="wrap") as ui.kinds:
        for one in KINDS.values():
            with gr.Tab(one.label, id=one.name, elem_id=f"kind-{one.name}") as tab:
                ui.controls |= one.layout()
            # In the browser alone, so that a click on Generate right after it is in time.
            tab.select(None, None, kind, js=f"() => '{one.name}'")
    text: dict[str, Any] = {"max_length": 10 * MAX_CHARACTERS}
    ui.add(
        "prompt",
        gr.Textbox(
            label="Prompt",
            lines=2,
            placeholder="What to draw. Enter generates, Shift + Enter starts a line",
            elem_id="prompt",
            autofocus=True,
            **text,
        ),
    )
    ui.add(
        "negative_prompt",
        gr.Textbox(
            label="Negative prompt", placeholder="What to avoid", elem_id="negative", **text
        ),
    )
    ui.examples = gr.Dataset(
        label="Examples",
        components=[ui.controls["prompt"]],
        samples=[],
        type="values",
        elem_id="examples",
    )
    ui.examples.click(lambda sample: sample[0], ui.examples, ui.controls["prompt"], queue=False)
    with gr.Row(elem_id="go"):
        ui.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
        ui.stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)


def _lay_out_result(ui: CreateControls) -> None:
    ui.status = gr.HTML(status_html("Ready"), elem_id="status")
    ui.images = gr.HTML(images_html([]), elem_id="images")
    with gr.Row(elem_id="again", visible=False) as ui.again:
        small: dict[str, Any] = {"size": "sm", "min_width": 90}
        ui.use_again = gr.Button("Use again", elem_id="use-again", **small)
        ui.to_image = gr.Button("To image to image", elem_id="to-image", **small)
        ui.to_inpaint = gr.Button("To inpaint", elem_id="to-inpaint", **small)
    ui.parameters = gr.Textbox(
        label="Settings of this image",
        lines=3,
        max_lines=8,
        interactive=False,
        buttons=["copy"],
        visible=False,
        elem_id="parameters",
    )
    ui.history = gr.Gallery(
        label="History of this session",
        format="png",
        columns=6,
        fit_columns=False,
        height="auto",
        allow_preview=False,
        object_fit="contain",
        interactive=False,
        buttons=[],
        elem_id="history",
    )


def _lay_out_settings(ui: CreateControls) -> None:
    def slider(
        name: str, label: str, *, ends: tuple[float, float], by: float, info: str = ""
    ) -> None:
        options: dict[str, Any] = {"label": label, "info": info or None, "elem_id": name}
        ui.add(name, gr.Slider(*ends, getattr(DEFAULTS, name), step=by, **options))

    with gr.Row():
        slider("width", "Width", ends=(8, 4096), by=8)
        slider("height", "Height", ends=(8, 4096), by=8)
    swap = gr.Button("Swap width and height", size="sm", elem_id="swap")
    sides = [ui.controls["width"], ui.controls["height"]]
    swap.click(None, sides, sides, js="(width, height) => [height, width]")
    info = "Larger images: predicted in overlapping windows of the trained size"
    ui.add("windows", gr.Checkbox(False, label="Windows", info=info, elem_id="windows"))
    ui.size_note = gr.HTML(elem_id="size-note")
    with gr.Row():
        slider("num_inference_steps", "Steps", ends=(1, MAX_STEPS), by=1)
        slider("guidance_scale", "Guidance", ends=RANGES["guidance_scale"], by=0.1)
    with gr.Row():
        options: dict[str, Any] = {"label": "Seed", "info": "Empty for a random one"}
        ui.add("seed", gr.Textbox(elem_id="seed", **options))
        slider("num_images_per_prompt", "Images", ends=(1, MAX_IMAGES), by=1)
    scheduler = gr.Dropdown(
        [OWN_SCHEDULER], value=OWN_SCHEDULER, label="Scheduler", elem_id="scheduler"
    )
    ui.add("scheduler", scheduler)
    with gr.Row(elem_id="lora-row"):
        ui.add("lora", gr.Dropdown([NO_LORA], value=NO_LORA, label="LoRA", elem_id="lora"))
        slider("lora_scale", "LoRA weight", ends=RANGES["lora_scale"], by=0.05)
    ui.refresh = gr.Button("Look for new LoRAs", size="sm", elem_id="refresh")
    with gr.Accordion("Settings from a PNG file", open=False, elem_id="from-png"):
        label = "Drop a PNG file made here or by A1111"
        ui.png = gr.File(label=label, file_types=[".png"], height=120, elem_id="png")
        ui.png_note = gr.HTML(elem_id="png-note")
    _lay_out_sdxl(ui)
    with gr.Accordion("More settings", open=False, elem_id="more"):
        info = "tiny decodes several times as fast, with less detail"
        vae = gr.Radio([OWN_VAE], value=OWN_VAE, label="VAE", info=info, elem_id="vae")
        ui.add("vae", vae)
        info = "Against colors that are too strong at a high guidance"
        ends = RANGES["guidance_rescale"]
        slider("guidance_rescale", "Guidance rescale", ends=ends, by=0.05, info=info)
        info = "How much of a window the next one covers too; more has fewer seams and takes longer"
        ends = RANGES["window_overlap"]
        slider("window_overlap", "Overlap of windows", ends=ends, by=0.05, info=info)
        slider("clip_skip", "CLIP skip", ends=(0, 12), by=1, info="0 uses all layers")
        choice = gr.Radio(LONG_PROMPTS, value=LONG_PROMPTS[0], label="Long prompts")
        ui.add("long_prompts", choice)
        ui.add("prompt_weighting", gr.Checkbox(True, label="(red:1.3) apple weighs the word red"))


def _lay_out_sdxl(ui: CreateControls) -> None:
    """Lay out what SDXL alone reads."""

    def text(name: str, label: str, *, placeholder: str, lines: int = 1) -> None:
        options: dict[str, Any] = {"label": label, "placeholder": placeholder, "lines": lines}
        ui.add(name, gr.Textbox(max_length=10 * MAX_CHARACTERS, elem_id=name, **options))

    with gr.Accordion(
        "Second prompts and sizes", open=False, visible=False, elem_id="of-sdxl"
    ) as ui.of_sdxl:
        same = "Empty: the same as the first"
        text("prompt_2", "Prompt of the second text encoder", placeholder=same, lines=2)
        text("negative_prompt_2", "Negative prompt of the second text encoder", placeholder=same)
        gr.HTML(note_html(SIZES_NOTE))
        with gr.Row():
            for name, (what, default) in SIZE_LABELS.items():
                text(name, what.capitalize(), placeholder=default)
        with gr.Row():
            for name, (what, _) in SIZE_LABELS.items():
                text(f"negative_{name}", f"Negative: {what}", placeholder="as above")
