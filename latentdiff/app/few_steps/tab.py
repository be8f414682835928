"""The tab that sets two models next to each other: a student and its teacher, and their time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import gradio as gr

from latentdiff.app.few_steps.comparison import (
    DEFAULT_SEED,
    Side,
    SideImage,
    compare_sides,
    verdict,
)
from latentdiff.app.image_request import MAX_CHARACTERS, MAX_STEPS
from latentdiff.app.page_html import event_html, images_html, note_html, status_html
from latentdiff.app.web_session import Event, WebSession

logger = logging.getLogger(__name__)
NOTE = (
    "The same prompt and seed by two models: one and the student that latentdiff distill made of "
    "it, or one model in fewer steps. Seconds are those of the call, without previews."
)
EMPTY = "Two images appear here"
Updates = dict[Any, Any]  # of components


class FewStepsTab:
    """The tab's components, connected to a session."""

    def __init__(self, session: WebSession) -> None:
        self.session = session
        self.models: list[Any] = []
        self.steps: list[Any] = []

    def lay_out(self, tab: gr.Tab) -> None:
        """Lay out and connect the tab."""
        gr.HTML(note_html(NOTE))
        with gr.Row():
            with gr.Column():
                go, stop = self._lay_out_settings()
            with gr.Column():
                self.status = gr.HTML(status_html("Ready"), elem_id="few-status")
                self.images = gr.HTML(images_html([], empty=EMPTY), elem_id="few-images")
        options: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        inputs = [*self.models, *self.steps, self.prompt, self.seed, self.guidance]
        shown = [self.status, self.images]
        gr.on([go.click, self.prompt.submit], self.compare, inputs, shown, **options)
        stop.click(self.stop, None, self.status, queue=False, show_progress="hidden")
        tab.select(self.list_models, self.models, self.models, **options)

    def _lay_out_settings(self) -> tuple[Any, Any]:
        """Lay out what is asked of both; return the buttons that begin and stop."""
        for number, label in enumerate(("First model", "Second model")):
            self._lay_out_side(label, number)
        text: dict[str, Any] = {"max_length": 10 * MAX_CHARACTERS}
        self.prompt = gr.Textbox(label="Prompt", elem_id="few-prompt", **text)
        with gr.Row():
            info = "Of both images"
            self.seed = gr.Textbox(DEFAULT_SEED, label="Seed", info=info, elem_id="few-seed")
            info = "Empty: each model's own"
            self.guidance = gr.Textbox(label="Guidance", info=info, elem_id="few-guidance")
        with gr.Row():
            go = gr.Button("Compare", variant="primary", elem_id="compare")
            return go, gr.Button("Stop", elem_id="few-stop")

    def _lay_out_side(self, label: str, number: int) -> None:
        names = list(self.session.library.models())
        value = names[min(number, len(names) - 1)] if names else None
        with gr.Row():
            choice = gr.Dropdown(names, value=value, label=label, elem_id=f"few-model-{number}")
            options: dict[str, Any] = {"info": "0: the model's own", "precision": 0}
            options |= {"minimum": 0, "maximum": MAX_STEPS, "elem_id": f"few-steps-{number}"}
            steps = gr.Number(0, label=f"Steps of the {label.lower()}", **options)
        self.models.append(choice)
        self.steps.append(steps)

    def list_models(self, *chosen: str | None) -> list[Any]:
        """List the models that are there now."""
        names = list(self.session.library.models())
        return [
            gr.update(choices=names, value=name if name in names else names[0]) for name in chosen
        ]

    def compare(self, client: gr.Request, *values: Any) -> Iterator[Updates]:
        """Make the image of each side; show what happens, and what each took."""
        first, second, *steps, prompt, seed, guidance = values
        sides = [Side(name, int(num)) for name, num in zip((first, second), steps, strict=True)]
        made: list[SideImage] = []
        try:
            asked = {"prompt": prompt, "seed": seed, "guidance_scale": _number(guidance)}
            name = _name_of(client)
            for event, made in compare_sides(self.session, sides, **asked, client=name):
                yield self._updates(event, made)
        except (ValueError, OSError) as error:
            yield {self.status: status_html(str(error), kind="error")}
            return
        except Exception as error:
            logger.exception("the comparison failed")
            text = f"{type(error).__name__}: {error}. The terminal shows where."
            yield {self.status: status_html(text, kind="error")}
            return
        if len(made) == len(sides):
            yield {self.status: status_html(verdict(made))}

    def _updates(self, event: Event, made: list[SideImage]) -> Updates:
        entries, captions = [one.entry for one in made], [str(one) for one in made]
        return {
            self.status: event_html(event),
            self.images: images_html(entries, captions, empty=EMPTY),
        }

    def stop(self, client: gr.Request) -> Any:
        """Stop this browser's comparison; its own iterator says so."""
        if self.session.stop(_name_of(client)):
            return gr.skip()
        return status_html("Nothing is running")


def _name_of(client: gr.Request) -> str:
    """Return a name for this browser's comparison, which is no call of the tab Create."""
    return f"few-steps {client.session_hash}"


def _number(text: str) -> float | None:
    """Return the guidance that is typed, None of nothing; ValueError for another text."""
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"Guidance: expected a number, or nothing for each model's own; got {text.strip()!r}"
        ) from None
