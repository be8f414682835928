"""The web UI: a page with prompt and settings in, the image as it forms and its settings out.

Needs gradio (the extra `ui`). Served on 127.0.0.1 by default, never shared; sizes, queue and
uploads are bounded. The page fetches nothing from elsewhere.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from latentdiff.app.web_session import (
    MAX_CHARACTERS,
    MAX_IMAGES,
    MAX_STEPS,
    NO_LORA,
    OWN_SCHEDULER,
    WebSession,
    find_loras,
    painted_mask,
)
from latentdiff.config.sampling import WebUIOptions
from latentdiff.models.components import load_vae
from latentdiff.pipeline.files.model_info import default_guidance
from latentdiff.pipeline.initial_latents import trained_size_px
from latentdiff.pipeline.output import LatentDiffOutput
from latentdiff.pipeline.schedulers import scheduler_names
from latentdiff.sampling.open_pipeline import open_pipeline

logger = logging.getLogger(__name__)

MAX_QUEUE = 8
MAX_UPLOAD = "10mb"


def serve(model: str, options: WebUIOptions) -> None:
    """Open a model, a folder or a hub id, and serve its page until interrupted."""
    import gradio as gr

    small = options.preview_vae
    pipe = open_pipeline(
        model,
        dtype=options.dtype,
        device=options.device,
        fast=True,
        safety_checker=options.safety_checker,
    )
    session = WebSession(
        pipe,
        loras=find_loras(options.loras),
        preview_vae=None if small is None else load_vae(small).to(pipe.device),
        max_side_px=options.max_side_px,
    )
    page = build(session)
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)
    page.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
    )


def build(session: WebSession) -> Any:
    """Return the gradio page."""
    import gradio as gr

    with gr.Blocks(title="LatentDiff", analytics_enabled=False) as page:
        gr.Markdown("# LatentDiff")
        with gr.Row():
            with gr.Column():
                controls = _controls(gr, session)
            with gr.Column():
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                state = gr.Markdown("ready", elem_id="state")
                gallery = gr.Gallery(label="Images", format="png", elem_id="images")
                settings = gr.JSON(label="Settings")

        def generate(values: Mapping[Any, Any]) -> Iterator[tuple[Any, Any, str]]:
            named = {name: values[control] for name, control in controls.items()}
            try:
                yield from _generate(session, named)
            except ValueError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from error
            except Exception as error:
                logger.exception("the call failed")
                message = html.escape(f"{type(error).__name__}: {error}")
                raise gr.Error(message, print_exception=False) from error

        running = start.click(
            generate, {*controls.values()}, [gallery, settings, state], show_progress="hidden"
        )
        stop.click(None, cancels=[running])
    return page


def _controls(gr: Any, session: WebSession) -> dict[str, Any]:
    """Lay out the input side; return its components by name."""
    factor, most = session.pipe.vae_scale_factor, session.max_side_px
    height, width = trained_size_px(session.pipe.unet, factor=factor)
    own = default_guidance(session.pipe.model_info)
    found: dict[str, Any] = {}

    def text(name: str, label: str) -> None:
        found[name] = gr.Textbox(label=label, max_length=MAX_CHARACTERS, elem_id=name)

    def slider(name: str, label: str, *, ends: tuple[float, float], at: float, by: float) -> None:
        found[name] = gr.Slider(*ends, at, step=by, label=label, elem_id=name)

    def choice(name: str, label: str, choices: list[str]) -> None:
        found[name] = gr.Dropdown(choices, value=choices[0], label=label, elem_id=name)

    text("prompt", "Prompt")
    text("negative_prompt", "Negative prompt")
    with gr.Row():
        text("seed", "Seed, empty for a new one")
        slider("num_images_per_prompt", "Images", ends=(1, MAX_IMAGES), at=1, by=1)
    with gr.Row():
        slider("num_inference_steps", "Steps", ends=(1, MAX_STEPS), at=30, by=1)
        slider("guidance_scale", "Guidance", ends=(min(1, own), max(20, own)), at=own, by=0.1)
    with gr.Row():
        slider("width", "Width", ends=(factor, most), at=width, by=factor)
        slider("height", "Height", ends=(factor, most), at=height, by=factor)
    with gr.Row():
        choice("scheduler", "Scheduler", [OWN_SCHEDULER, *scheduler_names()])
        choice("lora", "LoRA", [NO_LORA, *session.loras])
        slider("lora_scale", "LoRA scale", ends=(0, 2), at=1, by=0.05)
    with gr.Accordion("Start from an image", open=False):
        found["image"] = gr.ImageEditor(
            type="pil", label="Paint over the part to be replaced", transforms=()
        )
        slider("strength", "Strength", ends=(0.05, 1), at=0.8, by=0.05)
    return found


def _generate(session: WebSession, named: dict[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Yield images, settings and state for the output side."""
    scheduler, lora = named.pop("scheduler"), named.pop("lora")
    image, mask = painted_mask(named.pop("image"))
    call = named | {"image": image, "mask_image": mask, "seed": _seed(named["seed"])}
    call["negative_prompt"] = call["negative_prompt"] or None
    if image is None:
        call["strength"] = None
    if lora == NO_LORA:
        call["lora_scale"] = None
    for event in session.generate(call, scheduler=scheduler, lora=lora):
        if isinstance(event, LatentDiffOutput):
            captions = [f"seed {seed}" for seed in event.seeds or []]
            yield list(zip(event.images, captions, strict=True)), event.settings, "done"
        else:
            i, images = event
            yield images, None, f"step {i + 1} of {session.pipe.num_timesteps}"


def _seed(text: str) -> int | None:
    try:
        return int(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"seed must be a whole number or empty, got {text!r}") from None
