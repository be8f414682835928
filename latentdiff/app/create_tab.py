"""The tab that makes images: what it looks like, and what its buttons do.

The settings of a request are `controls`, named as the fields of ImageRequest or as a kind's own;
what they mean is image_request.py's, and the making of images web_session.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from latentdiff.app.create_layout import CreateControls
from latentdiff.app.history import HistoryEntry
from latentdiff.app.image_request import (
    CONTROL_SCALE,
    IMAGE,
    INPAINT,
    ImageRequest,
    find_problems,
    request_from_settings,
)
from latentdiff.app.kinds import KINDS, painted_mask, painting_of
from latentdiff.app.library import NO_CONTROLNET, NO_LORA
from latentdiff.app.model_facts import ModelFacts
from latentdiff.app.page_html import (
    event_html,
    facts_html,
    images_html,
    note_html,
    previews_html,
    status_html,
)
from latentdiff.app.web_session import Event, Finished, Step, WebSession
from latentdiff.pipeline.files.model_info import DEFAULT_NOISE_LEVEL
from latentdiff.pipeline.png_metadata import read_settings
from latentdiff.pipeline.webui_parameters import parameters_text

logger = logging.getLogger(__name__)
Updates = dict[Any, Any]  # of components
NUM_EXAMPLES = 8
TO_THE_TOP = "() => { document.querySelector('#create').scrollIntoView() }"


class CreateTab:
    """The tab's controls, connected to a session."""

    def __init__(self, session: WebSession, page: gr.Blocks, ui: CreateControls) -> None:
        self.session, self.ui = session, ui
        self._connect_generate()
        self._connect_model(page)
        self._connect_history()
        self._connect_settings()

    def _connect_generate(self) -> None:
        ui, inputs = self.ui, [*self.ui.controls.values()]
        shown = [*ui.of_image(), ui.status, ui.history]
        hidden: dict[str, Any] = {"show_progress": "hidden"}
        named = ui.generate.click(self.name_problems, inputs, ui.status, queue=False, **hidden)
        named.success(  # not at once: an event that ends takes the validator's messages away
            self.generate,
            inputs,
            shown,
            validator=self.validate,
            concurrency_limit=None,
            trigger_mode="once",
            **hidden,
        )
        ui.stop.click(self.stop, None, ui.status, queue=False, **hidden)

    def _connect_model(self, page: gr.Blocks) -> None:
        ui = self.ui
        model, changed = ui.controls["model"], ui.of_model()
        options: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        model.input(self.open_model, model, [*changed, ui.status], **options)
        loaded = [model, ui.controls["lora"], ui.history, *ui.of_image(), *changed]
        page.load(self.load, None, loaded, **options)
        lora, net = ui.controls["lora"], ui.controls["controlnet"]
        gr.on([ui.refresh.click, lora.focus], self.list_loras, lora, lora, **options)
        net.focus(self.list_controlnets, net, net, **options)
        size = [ui.controls["width"], ui.controls["height"]]
        windows = ui.controls["windows"]
        canvas = [*size, windows, ui.controls["window_overlap"]]
        gr.on([one.change for one in canvas], self.note_size, canvas, ui.size_note, **options)
        windows.input(self.limit_size, canvas[:3], size, **options)
        ui.controls["start_image"].upload(
            self.fit_size, ui.controls["start_image"], size, show_progress="hidden"
        )
        condition = ui.controls["condition"]
        inputs = [condition, windows]
        condition.upload(self.fit_condition, inputs, size, show_progress="hidden")
        painting = ui.controls["painting"]
        fitted = [*size, painting, ui.fitted]
        painting.upload(self.fit_painting, [painting, ui.fitted], fitted, show_progress="hidden")

    def _connect_history(self) -> None:
        ui = self.ui
        ui.history.select(self.show, None, ui.of_image(), show_progress="hidden")
        filled = [*ui.controls.values(), ui.kinds, ui.fitted, *ui.of_model(), ui.status]
        filled = list(dict.fromkeys(filled))
        again = (
            (ui.use_again, self.use_again),
            (ui.to_image, partial(self.start_from, IMAGE)),
            (ui.to_inpaint, partial(self.start_from, INPAINT)),
        )
        for button, fill in again:
            done = button.click(fill, ui.selected, filled, show_progress="hidden")
            done.success(None, None, None, js=TO_THE_TOP)

    def _connect_settings(self) -> None:
        ui = self.ui
        filled = [*ui.controls.values(), ui.kinds, ui.png_note]
        inputs = [ui.png, *ui.controls.values()]
        ui.png.upload(self.read_png, inputs, filled, show_progress="hidden")

    def request(self, values: tuple[Any, ...]) -> ImageRequest:
        """Return the request that the controls' values state."""
        named = dict(zip(self.ui.controls, values, strict=True))
        common = {name: named[name] for name in self.ui.shared}
        for name in ("width", "height", "num_images_per_prompt", "num_inference_steps"):
            common[name] = int(common[name])
        common["clip_skip"] = int(common["clip_skip"])
        return ImageRequest(**common, **KINDS[named["kind"]].read(named))

    def problems(self, values: tuple[Any, ...]) -> dict[str, str]:
        """Return what is wrong by control."""
        request, facts = self.request(values), self.session.facts
        if facts is None or facts.name != request.model:
            return {}
        kind, found = KINDS[request.kind], find_problems(request, facts)
        return {kind.control_of(name): message for name, message in found.items()}

    def validate(self, *values: Any) -> list[Any]:
        """Say next to each control what is wrong with it."""
        found = self.problems(values)
        return [gr.validate(name not in found, found.get(name, "")) for name in self.ui.controls]

    def name_problems(self, *values: Any) -> Any:
        """Return a status line that names each problem, as its control may be out of sight."""
        labels = {name: control.label for name, control in self.ui.controls.items()}
        found = [f"{labels[name]}: {text}" for name, text in self.problems(values).items()]
        return status_html(". ".join(found), kind="error") if found else gr.skip()

    def generate(self, client: gr.Request, *values: Any) -> Iterator[Updates]:
        """Make the images; show each step, what went wrong, or the result."""
        request, status = self.request(values), self.ui.status
        try:
            for event in self.session.generate(request, client=client.session_hash or ""):
                yield self._updates(event, request)
        except (ValueError, OSError) as error:
            yield {status: status_html(str(error), kind="error")}
        except Exception as error:
            logger.exception("the call failed")
            text = f"{type(error).__name__}: {error}. The terminal shows where."
            yield {status: status_html(text, kind="error")}

    def _updates(self, event: Event, request: ImageRequest) -> Updates:
        updates: Updates = {self.ui.status: event_html(event)}
        if isinstance(event, Step) and event.images:
            size = {"width": request.width, "height": request.height}
            updates[self.ui.images] = previews_html(event.images, **size)
        if isinstance(event, Finished):
            updates |= self._shown(event.entries) | {self.ui.history: self._gallery()}
        return updates

    def stop(self, client: gr.Request) -> Any:
        """Stop this browser's call; its own iterator says so."""
        if self.session.stop(client.session_hash or ""):
            return gr.skip()
        return status_html("Nothing is running")

    def load(self) -> Updates:
        """Bring a page that was just opened up to date."""
        ui, library = self.ui, self.session.library
        newest = self.session.history.entries()[:1]
        updates: Updates = {ui.history: self._gallery()} | self._shown(newest)
        updates[ui.controls["lora"]] = gr.update(choices=self._lora_names())
        updates[ui.controls["controlnet"]] = gr.update(choices=self._controlnet_names())
        facts = self.session.facts
        name = facts.name if facts else None
        updates[ui.controls["model"]] = gr.update(choices=list(library.models()), value=name)
        return updates | (self._defaults(facts) if facts else {})

    def open_model(self, name: str) -> Iterator[Updates]:
        """Open another model; the settings take its defaults."""
        yield {self.ui.status: status_html(f"Opening {name} ...", kind="running")}
        try:
            facts = self.session.open(name)
        except (ValueError, OSError) as error:
            yield {self.ui.status: status_html(str(error), kind="error")}
            return
        status = {self.ui.status: status_html(f"{name} is open")}
        yield self._defaults(facts) | status

    def _facts_updates(self, facts: ModelFacts) -> Updates:
        """Return what the page shows of a model, and the limits of the settings."""
        ui, controls = self.ui, self.ui.controls
        side, reads = _side_limits(facts, in_windows=False), facts.condition_kind
        can_guide = reads == "instruct_pix2pix" and facts.image_guidance_scale > 1
        return {
            ui.facts: facts_html(facts),
            ui.examples: gr.Dataset(samples=[[text] for text in facts.examples[:NUM_EXAMPLES]]),
            controls["width"]: side,
            controls["height"]: side,
            controls["scheduler"]: gr.update(choices=list(facts.schedulers)),
            controls["vae"]: gr.update(choices=list(facts.vaes), visible=len(facts.vaes) > 1),
            controls["clip_skip"]: gr.update(maximum=max(facts.max_clip_skip, 1)),
            controls["noise_level"]: gr.update(
                maximum=max(facts.max_noise_level, 1), visible=reads == "upscale"
            ),
            controls["image_guidance_scale"]: gr.update(visible=can_guide),
            controls["controlnet"]: gr.update(
                choices=self._controlnet_names(), visible=reads == "none"
            ),
            controls[CONTROL_SCALE]: gr.update(visible=reads == "none"),
            controls["windows"]: gr.update(),
            ui.of_sdxl: gr.update(visible=facts.is_sdxl),
        }

    def _defaults(self, facts: ModelFacts) -> Updates:
        """Return what the page shows of a model, with the model's own settings."""
        controls, updates = self.ui.controls, self._facts_updates(facts)
        values = {name: getattr(facts, name) for name in ("width", "height", "clip_skip")}
        values["noise_level"] = min(DEFAULT_NOISE_LEVEL, facts.max_noise_level)
        values["image_guidance_scale"] = facts.image_guidance_scale
        values |= {"scheduler": facts.schedulers[0], "vae": facts.vaes[0]}
        values |= {"windows": False, "controlnet": NO_CONTROLNET}
        for name, value in values.items():
            updates[controls[name]] = updates[controls[name]] | {"value": value}
        for name in ("guidance_scale", "num_inference_steps"):
            updates[controls[name]] = getattr(facts, name)
        return updates | {self.ui.size_note: ""}

    def list_loras(self, name: str) -> Any:
        """List the LoRAs that are there now."""
        names = self._lora_names()
        return gr.update(choices=names, value=name if name in names else NO_LORA)

    def list_controlnets(self, name: str) -> Any:
        """List the ControlNets that are there now."""
        names = self._controlnet_names()
        return gr.update(choices=names, value=name if name in names else NO_CONTROLNET)

    def _lora_names(self) -> list[str]:
        return [NO_LORA, *self.session.library.loras()]

    def _controlnet_names(self) -> list[str]:
        return [NO_CONTROLNET, *self.session.controlnets()]

    def note_size(self, width: float, height: float, windows: bool, overlap: float) -> str:
        """Warn of sizes far beyond the trained one, or state the cost of windows."""
        facts, size = self.session.facts, (int(width), int(height))
        if facts is None:
            return ""
        if windows:
            return note_html(facts.windows_note(*size, overlap=overlap))
        return note_html(facts.size_warning(*size), kind="warning")

    def limit_size(self, width: float, height: float, windows: bool) -> Any:
        """Let sizes be as large as they may be with windows, or without."""
        facts = self.session.facts
        if facts is None:
            return gr.skip()
        limits = _side_limits(facts, in_windows=windows)
        return [limits | {"value": min(side, limits["maximum"])} for side in (width, height)]

    def fit_size(self, image: Image.Image | None) -> Any:
        """Set the size to an image's proportions."""
        facts = self.session.facts
        if image is None or facts is None:
            return gr.skip()
        return facts.size_for(*image.size)

    def fit_condition(self, image: Image.Image | None, windows: bool) -> Any:
        """Set the size to that of the image to be made of a condition."""
        facts = self.session.facts
        if image is None or facts is None:
            return gr.skip()
        return facts.size_of_condition(*image.size, in_windows=windows)

    def fit_painting(self, value: dict[str, Any] | None, fitted: Any) -> Updates:
        """Set the size to the proportions of the image to paint over; enlarge a small one.

        fitted: size of the image that the settings were made for, as the editor says "upload" of
        an image too that was put there or came into sight.
        """
        image, facts, controls = painted_mask(value)[0], self.session.facts, self.ui.controls
        if image is None or facts is None or image.size == fitted:
            return {self.ui.fitted: gr.skip()}
        width, height = facts.size_for(*image.size)
        painting = painting_of(image, None)
        size = painting["background"].size
        updates: Updates = {controls["width"]: width, controls["height"]: height}
        if size != image.size:
            updates[controls["painting"]] = painting
        return updates | {self.ui.fitted: size}

    def show(self, chosen: gr.SelectData) -> Updates:
        """Show an image of the history."""
        entry = self.session.history.find(Path(chosen.value["image"]["path"]).name)
        return self._shown([entry] if entry else [])

    def _shown(self, entries: list[HistoryEntry]) -> Updates:
        """Show entries, the first of which the buttons below act on."""
        ui, first = self.ui, entries[0] if entries else None
        text = parameters_text(first.settings) if first else ""
        return {
            ui.images: images_html(entries),
            ui.selected: first.path.name if first else "",
            ui.parameters: gr.update(value=text or "", visible=bool(text)),
            ui.again: gr.update(visible=first is not None),
        }

    def _gallery(self) -> Any:
        entries = self.session.history.entries()
        return gr.update(value=[str(entry.path) for entry in entries], selected_index=None)

    def use_again(self, name: str) -> Updates:
        """Put all settings of an image of the history back."""
        if (entry := self.session.history.find(name)) is None:
            return self._not_there()
        return self._filled(entry.request)

    def start_from(self, kind: str, name: str) -> Updates:
        """Take an image of the history as the start of another kind."""
        if (entry := self.session.history.find(name)) is None:
            return self._not_there()
        with Image.open(entry.path) as file:
            image = file.convert("RGB")
        fields: dict[str, Any] = {
            "kind": kind,
            "image": image,
            "mask_image": None,
            "strength": None,
            "condition": None,
            "seed": "",
        }
        return self._filled(replace(entry.request, **fields))

    def _not_there(self) -> Updates:
        return {self.ui.status: status_html("Make or choose an image first")}

    def _filled(self, request: ImageRequest) -> Updates:
        """Return updates that put a request's values into the controls."""
        controls, updates = self.ui.controls, {}
        facts = self.session.facts
        if facts is None or facts.name != request.model:
            facts = self.session.open(request.model)
            updates = self._facts_updates(facts)
        side = _side_limits(facts, in_windows=request.windows)
        updates |= {controls["width"]: side, controls["height"]: side}
        values = {name: getattr(request, name) for name in self.ui.shared}
        values |= KINDS[request.kind].fill(request)
        for name, value in values.items():
            limits = updates.get(controls[name], gr.update())
            updates[controls[name]] = limits | {"value": value}
        if values.get("painting"):
            updates[self.ui.fitted] = values["painting"]["background"].size
        lora = gr.update(choices=self._lora_names(), value=request.lora)
        updates[controls["lora"]] = lora
        return updates | {self.ui.kinds: gr.Tabs(selected=request.kind)}

    def read_png(self, path: str | None, *values: Any) -> Updates:
        """Put the settings of a PNG file into the controls."""
        note, facts = self.ui.png_note, self.session.facts
        if path is None or facts is None:
            return {note: ""}
        try:
            settings = read_settings(path)
        except (ValueError, OSError) as error:
            text = str(error).replace(str(path), Path(path).name)
            return {note: note_html(text, kind="warning")}
        if isinstance(settings, list):
            settings = settings[0] if settings else {}
        now = self.request(values)
        loras = self.session.library.loras()
        request, notes = request_from_settings(settings, now, facts=facts, loras=loras)
        text = ". ".join(["Settings taken from the file", *notes]) + "."
        return self._filled(request) | {note: note_html(text)}


def _side_limits(facts: ModelFacts, *, in_windows: bool) -> dict[str, Any]:
    """Return an update of a side's slider: where it begins and ends, and its step."""
    maximum = facts.max_side(in_windows=in_windows)
    update: dict[str, Any] = gr.update(minimum=facts.multiple, maximum=maximum, step=facts.multiple)
    return update
