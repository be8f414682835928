"""HTML reports: page skeleton and style, tables, figures, images inlined. No scripts, no fetches.

jinja2 escapes every text. Only `Markup`, which each function here returns, is HTML already.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cache

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a7d3f; --bad: #b3261e }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
th { overflow-wrap: normal } td:first-child:not(.n) { min-width: 9rem }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
p, li, summary, dd { overflow-wrap: anywhere }
td.n:first-child, th.n:first-child { width: 1% }
.grid { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: 128px }
figcaption, figcaption .soft { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere }
img { background: var(--soft); border-radius: .2rem; display: block; max-width: 128px;
  height: auto } .group { border: 1px solid var(--line); border-radius: .3rem; padding: .4rem }
.soft { opacity: .7; font-size: .85rem }
@media (max-width: 40rem) { body { margin: 1rem auto } td, th { padding: .25rem .35rem;
  font-size: .85rem } td:first-child:not(.n) { min-width: 6rem } td.n, th.n { white-space: normal }
  table:has(th:nth-child(5)) :is(td, th) { overflow-wrap: normal } td.soft { min-width: 8rem }
  table:has(th:nth-child(5)) td.n { white-space: nowrap }
  .grid > figure { width: calc(50% - .4rem) } .grid > figure img { width: 100%; max-width: 100% }
  table:has(th:nth-child(5)) { display: block; overflow-x: auto } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PAGE = """\
<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>{{ style }}</style></head><body>{{ body }}</body></html>"""
_TABLE = """\
{% macro row(cells, tag) %}
<tr>{% for cell in cells %}
<{{ tag }}{% if classes and classes[loop.index0] %} class="{{ classes[loop.index0] }}"{% endif %}>
{{- cell }}</{{ tag }}>
{%- endfor %}</tr>
{%- endmacro %}
<table>{{ row(head, "th") }}{% for cells in rows %}{{ row(cells, "td") }}{% endfor %}</table>"""
_FIGURE = """\
<figure>{{ image }}<figcaption>{{ label }}{% if label and note %}<br>{% endif %}
{% if note %}<span class="soft">{{ note }}</span>{% endif %}</figcaption></figure>"""
_IMAGE = """\
<img{% if kind %} class="{{ kind }}"{% endif %} alt="" width="{{ width }}" height="{{ height }}" \
src="{{ source }}">"""


def render_template(template: str, **values: object) -> Markup:
    """Fill in a jinja2 template; values that are not Markup are made printable and escaped."""
    return Markup(_compiled(template).render(values))


def page(title: str, *, body: Markup, style: str = "") -> str:
    """Return a whole page: one file, whose policy forbids scripts and fetching; `style` is CSS."""
    return render_template(
        _PAGE, policy=Markup(POLICY), title=title, style=Markup(STYLE + style), body=body
    )


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, classes: Sequence[str] = ()
) -> Markup:
    """Lay out a table; `classes` has each column's CSS class or "", as "n" for numbers."""
    return render_template(_TABLE, head=head, rows=rows, classes=classes)


def figure(image: Markup, *, label: str = "", note: str = "") -> Markup:
    """Put an image over its label and, in soft print, a note."""
    return render_template(_FIGURE, image=image, label=label, note=note)


def grid(items: Iterable[Markup]) -> Markup:
    """Set figures next to each other in lines that wrap."""
    return render_template('<div class="grid">{{ items }}</div>', items=Markup().join(items))


def inline_image(image: Image.Image, *, format: str = "PNG", kind: str = "") -> Markup:
    """Encode an image into an img element; `kind` is its CSS class."""
    width, height = image.size
    source = Markup(data_url(image, format=format))
    return render_template(_IMAGE, kind=kind, width=width, height=height, source=source)


def data_url(image: Image.Image, *, format: str = "PNG") -> str:
    """Return an image as a URL that holds it."""
    file = io.BytesIO()
    image.save(file, format, **({"quality": 80} if format == "JPEG" else {}))
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def printable(text: str) -> str:
    """Escape control characters, which a terminal or browser would obey rather than show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@cache
def _compiled(template: str) -> Template:
    environment = Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(template)
