"""The evaluation as one HTML file: tables, bars, images. No scripts, nothing fetched, escaped."""

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from latentdiff.atomic import write_text
from latentdiff.evaluation.metrics.bootstrap import Interval
from latentdiff.evaluation.report.section import LabelledImage, Row, Section
from latentdiff.html import POLICY, printable
from latentdiff.html import STYLE as HOUSE_STYLE

SIDE = 128  # of an image on the page, in pixels
MAX_CAPTION = 90  # letters under an image
STYLE = (
    HOUSE_STYLE
    + """
body { max-width: 82rem } figure { width: auto }
h2 { border-top: 1px solid var(--line); padding-top: 1.2rem }
.group { display: flex; gap: .4rem } .group figure { width: 128px }
.group img { width: 128px; image-rendering: pixelated }
img.plot { max-width: 100%; background: white }
td.v { white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums }
td.b { width: 11rem; min-width: 7rem; vertical-align: middle }
.track { position: relative; height: .5rem; background: var(--soft); border-radius: .25rem }
.track i { position: absolute; top: 0; bottom: 0; background: #4a7bd0aa; border-radius: .25rem }
.track b { position: absolute; top: -.15rem; bottom: -.15rem; width: 3px; margin-left: -1px;
  background: #1f4e9c }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dt { opacity: .7 } dd { margin: 0; overflow-wrap: anywhere }
"""
)


def write_evaluation_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    left_out: Mapping[str, str],
) -> Path:
    """Write the page to `path`, replacing what is there at once; return the path."""
    write_text(
        path, evaluation_html(title=title, facts=facts, sections=sections, left_out=left_out)
    )
    return path


def evaluation_html(
    *,
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    left_out: Mapping[str, str],
) -> str:
    """Lay out an evaluation: its facts, each section's headline, the sections, what is left out."""
    told = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(fact)}</dd>" for name, fact in facts.items())
    parts = [
        f"<h1>{_safe(title)}</h1><dl>{told}</dl>",
        _glance(sections),
        *(_section(section) for section in sections),
        _left_out(left_out),
    ]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_safe(title)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def number(value: float) -> str:
    """Write a figure with four digits."""
    return f"{value:.4g}"


def _glance(sections: Iterable[Section]) -> str:
    rows = [section.rows[0] for section in sections if section.rows and section.has_headline]
    return f"<h2>At a glance</h2>{_table(rows)}" if rows else ""


def _section(section: Section) -> str:
    notes = "".join(f'<p class="soft">{_safe(note)}</p>' for note in section.notes)
    plots = "".join(_image(Image.open(plot), "plot") for plot in section.plots)
    groups = "".join(_group(group) for group in section.groups)
    images = f'<div class="grid">{groups}</div>' if groups else ""
    return f"<h2>{_safe(section.title)}</h2>{_table(section.rows)}{notes}{images}{plots}"


def _left_out(reasons: Mapping[str, str]) -> str:
    lines = (f"<li>{_safe(name)}: {_safe(why)}</li>" for name, why in reasons.items())
    return f"<h2>Left out</h2><ul>{''.join(lines)}</ul>" if reasons else ""


def _table(rows: Iterable[Row]) -> str:
    lines = "".join(_row(row) for row in rows)
    head = '<tr><th></th><th class="n">figure</th><th class="n">95 % interval</th><th></th>'
    head += '<th class="n">n</th><th></th></tr>'
    return f"<table>{head}{lines}</table>" if lines else ""


def _row(row: Row) -> str:
    label, note = _safe(row.label), f'<span class="soft">{_safe(row.note)}</span>'
    if isinstance(row.value, str):
        value = f'<td class="v">{_safe(row.value)}</td><td></td><td></td><td></td>'
        return f"<tr><td>{label}</td>{value}<td>{note}</td></tr>"
    interval = row.value
    write = _percent if row.is_share else number
    bounds = f"{write(interval.low)} … {write(interval.high)}"
    bar = _bar(interval) if row.is_share and interval.low >= 0 else ""
    return (
        f'<tr><td>{label}</td><td class="v"><strong>{write(interval.estimate)}</strong></td>'
        f'<td class="v">{bounds}</td><td class="b">{bar}</td>'
        f'<td class="v">{interval.num_samples:,}</td><td>{note}</td></tr>'
    )


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _bar(interval: Interval) -> str:
    """Draw a share's interval on a track from 0 to 1."""
    low, high, mark = (
        100 * min(max(x, 0.0), 1.0) for x in (interval.low, interval.high, interval.estimate)
    )
    return (
        f'<div class="track"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
        f'<b style="left:{mark:.1f}%"></b></div>'
    )


def _group(group: Sequence[LabelledImage]) -> str:
    return f'<div class="group">{"".join(_figure(shown) for shown in group)}</div>'


def _figure(shown: LabelledImage) -> str:
    label = _safe(textwrap.shorten(shown.label, MAX_CAPTION, placeholder=" …"))
    note = f'<br><span class="soft">{_safe(shown.note)}</span>' if shown.note else ""
    return f"<figure>{_image(shown.image)}<figcaption>{label}{note}</figcaption></figure>"


def _image(image: Image.Image, kind: str = "") -> str:
    """Put an image into the page; sheets stay as they are, others are shrunk to SIDE."""
    if not kind and max(image.size) > 2 * SIDE:
        image = image.copy()
        image.thumbnail((2 * SIDE, 2 * SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    named = f' class="{kind}"' if kind else ""
    return f'<img{named} alt="" src="data:image/png;base64,{data}">'


def _safe(text: object) -> str:
    return escape(printable(str(text)))
