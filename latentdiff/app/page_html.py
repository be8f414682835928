"""The parts of the page that are plain HTML: status line, images, facts of a model, notes."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from markupsafe import Markup
from PIL import Image

from latentdiff.app.history import HistoryEntry
from latentdiff.app.model_facts import ModelFacts
from latentdiff.app.web_session import Event, Opening, Step, Stopped, Waiting
from latentdiff.html import data_url, render_template

PIXELATED_PX = 256  # images with no side beyond it are enlarged without smoothing
FILE_ROUTE = "gradio_api/file="

_STATUS = """\
<div class="status {{ kind }}" role="{{ "alert" if kind == "error" else "status" }}">\
<span>{{ text }}</span>{% if maximum %}<div class="bar" role="progressbar" aria-label="steps" \
aria-valuemin="0" aria-valuemax="{{ maximum }}" aria-valuenow="{{ value }}">\
<i style="width: {{ 100 * value // maximum }}%"></i></div>{% endif %}</div>"""
_IMAGES = """\
<div class="images" style="--n: {{ shown|length }}">{% for one in shown %}\
<figure style="--w: {{ one.width }}px"><img src="{{ one.src }}" alt="{{ one.alt }}" \
class="{{ one.kind }}" width="{{ one.width }}" height="{{ one.height }}">\
<figcaption>{{ one.caption }}{% if one.link %} \
<a href="{{ one.src }}" download>Download</a>{% endif %}</figcaption></figure>{% endfor %}</div>"""
_EMPTY = '<div class="images empty"><p>{{ text }}</p></div>'
_FACTS = """\
<div class="facts">{% if summary %}<p>{{ summary }}</p>{% endif %}<dl>\
{% for label, value in rows %}\
<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl></div>"""
_NOTE = '<p class="note {{ kind }}">{{ text }}</p>'


def status_html(text: str, *, kind: str = "", value: int = 0, maximum: int = 0) -> str:
    """Return the status line. kind: "", "running" or "error"; value of maximum: a bar."""
    return render_template(_STATUS, text=text, kind=kind, value=value, maximum=maximum)


def event_html(event: Event) -> str:
    """Return the status line for what happens in a call."""
    if isinstance(event, Waiting):
        others = "1 image comes" if event.ahead == 1 else f"{event.ahead} images come"
        return status_html(f"Waiting: {others} first", kind="running")
    if isinstance(event, Opening):
        return status_html(f"Opening {event.name} ...", kind="running")
    if isinstance(event, Step):
        left = f", {event.seconds_left:.0f} s left" if event.seconds_left >= 1 else ""
        text = f"Step {event.step} of {event.num_steps}{left}"
        return status_html(text, kind="running", value=event.step, maximum=event.num_steps)
    if isinstance(event, Stopped):
        where = f" at step {event.step} of {event.num_steps}" if event.num_steps else ""
        return status_html(f"Stopped{where}")
    num = len(event.entries)
    text = f"{'1 image' if num == 1 else f'{num} images'} in {event.seconds:.1f} s"
    if event.num_flagged:
        text += f"; {event.num_flagged} blackened by the model's safety checker"
    return status_html(text)


def images_html(
    entries: Sequence[HistoryEntry],
    captions: Sequence[str] = (),
    *,
    empty: str = "Your image appears here",
) -> str:
    """Return finished images, uncropped, each with its caption and a link to its file.

    captions: by default the seed and the size of each. empty: what is said where there are none.
    """
    if not entries:
        return render_template(_EMPTY, text=empty)
    known = [f"seed {one.request.seed}, {one.size[0]} x {one.size[1]}" for one in entries]
    shown = [
        {
            "src": FILE_ROUTE + quote(str(entry.path)),
            "alt": entry.request.prompt or "an image",
            "kind": "pixels" if max(entry.size) <= PIXELATED_PX else "",
            "caption": caption,
            "link": True,
            "width": entry.size[0],
            "height": entry.size[1],
        }
        for entry, caption in zip(entries, captions or known, strict=True)
    ]
    return render_template(_IMAGES, shown=shown)


def previews_html(images: Sequence[Image.Image], *, width: int, height: int) -> str:
    """Return previews in the place and size of the images that they become, in pixels."""
    shown = [
        {
            "src": Markup(data_url(image)),
            "alt": "preview",
            "kind": "pixels" if max(width, height) <= PIXELATED_PX else "preview",
            "caption": "preview",
            "link": False,
            "width": width,
            "height": height,
        }
        for image in images
    ]
    return render_template(_IMAGES, shown=shown)


def facts_html(facts: ModelFacts) -> str:
    """Return what a model knows and how it was made."""
    return render_template(_FACTS, summary=facts.summary, rows=facts.rows)


def note_html(text: str, *, kind: str = "") -> str:
    """Return a remark next to a field, "" for none. kind: "warning" or ""."""
    return render_template(_NOTE, text=text, kind=kind) if text else ""
