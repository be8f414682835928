"""The evaluation as one HTML file: tables, bars, images; html.py escapes every text."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from latentdiff.atomic import write_text
from latentdiff.evaluation.metrics.bootstrap import Interval
from latentdiff.evaluation.report.section import LabelledImage, ReportRow, Section
from latentdiff.html import figure, grid, inline_image, page, render_template, table

SIDE = 128  # of an image on the page, in pixels
MAX_CAPTION = 90  # letters under an image
STYLE = """
body { max-width: 82rem } figure { width: auto }
h2 { border-top: 1px solid var(--line); padding-top: 1.2rem }
.group { display: flex; gap: .4rem; max-width: 100%; box-sizing: border-box }
.group figure { width: 128px; min-width: 0 }
.group img { width: 100%; image-rendering: pixelated }
img.plot { max-width: 100%; background: white }
td.b { width: 11rem; min-width: 7rem; vertical-align: middle }
.track { position: relative; height: .5rem; background: var(--soft); border-radius: .25rem }
.track i { position: absolute; top: 0; bottom: 0; background: #4a7bd0aa; border-radius: .25rem }
.track b { position: absolute; top: -.15rem; bottom: -.15rem; width: 3px; margin-left: -1px;
  background: #1f4e9c }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
@media (max-width: 40rem) { .b { display: none } }
dt { opacity: .7 } dd { margin: 0; overflow-wrap: anywhere }
"""
BODY = """\
<h1>{{ title }}</h1>
{% if warning %}<p><strong>{{ warning }}</strong></p>{% endif %}
<dl>{% for name, fact in facts.items() %}<dt>{{ name }}</dt><dd>{{ fact }}</dd>{% endfor %}</dl>
{% if headlines %}<h2>At a glance</h2>{{ headlines }}{% endif %}
{% for section in sections %}{{ section }}{% endfor %}
{% if skipped %}<h2>Skipped</h2><ul>
{% for name, why in skipped.items() %}<li>{{ name }}: {{ why }}</li>{% endfor %}</ul>{% endif %}"""
SECTION = """\
<h2>{{ title }}</h2>{{ rows }}
{% for note in notes %}<p class="soft">{{ note }}</p>{% endfor %}
{{ images }}{% for plot in plots %}{{ plot }}{% endfor %}"""
HEAD = ("", "figure", "95 % interval", "", "n", "")
CLASSES = ("", "n", "n", "b", "n", "soft")
BAR = """\
<div class="track"><i style="left:{{ low }}%;width:{{ width }}%"></i>\
<b style="left:{{ mark }}%"></b></div>"""


def write_evaluation_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    skipped: Mapping[str, str],
    warning: str = "",
) -> Path:
    """Write the page to `path`, replacing an older one at once; return the path."""
    html = evaluation_html(
        title=title, facts=facts, sections=sections, skipped=skipped, warning=warning
    )
    write_text(path, html)
    return path


def evaluation_html(
    *,
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    skipped: Mapping[str, str],
    warning: str = "",
) -> str:
    """Lay out an evaluation: its facts, each section's headline, the sections, skipped metrics.

    warning: about all figures, below the title.
    """
    headlines = [one.rows[0] for one in sections if one.rows and one.has_headline]
    body = render_template(
        BODY,
        title=title,
        warning=warning,
        facts=facts,
        headlines=_table(headlines),
        sections=[_section(section) for section in sections],
        skipped=skipped,
    )
    return page(title, body=body, style=STYLE)


def _section(section: Section) -> Markup:
    return render_template(
        SECTION,
        title=section.title,
        rows=_table(section.rows),
        notes=section.notes,
        images=grid(map(_group, section.groups)) if section.groups else "",
        plots=[inline_image(Image.open(plot), kind="plot") for plot in section.plots],
    )


def _table(rows: Sequence[ReportRow]) -> Markup:
    return table(HEAD, map(_cells, rows), classes=CLASSES) if rows else Markup()


def _cells(row: ReportRow) -> list[object]:
    """Return a row's cells: label, figure, interval, bar, number of samples, note."""
    if isinstance(row.value, str):
        return [row.label, row.value, "", "", "", row.note]
    interval, form = row.value, ".1%" if row.is_share else ".4g"
    return [
        row.label,
        render_template("<strong>{{ figure }}</strong>", figure=format(interval.estimate, form)),
        f"{interval.low:{form}} … {interval.high:{form}}",
        _bar(interval) if row.is_share and interval.low >= 0 else "",
        f"{interval.num_samples:,}",
        row.note,
    ]


def _bar(interval: Interval) -> Markup:
    """Mark a share's interval and estimate on a track from 0 to 1."""
    low, high, mark = (
        100 * min(max(x, 0.0), 1.0) for x in (interval.low, interval.high, interval.estimate)
    )
    return render_template(BAR, low=f"{low:.1f}", width=f"{high - low:.1f}", mark=f"{mark:.1f}")


def _group(group: Sequence[LabelledImage]) -> Markup:
    return render_template(
        '<div class="group">{{ images }}</div>', images=Markup().join(map(_figure, group))
    )


def _figure(one: LabelledImage) -> Markup:
    image = one.image
    if max(image.size) > 2 * SIDE:
        image = image.copy()
        image.thumbnail((2 * SIDE, 2 * SIDE))
    label = textwrap.shorten(one.label, MAX_CAPTION, placeholder=" …")
    return figure(inline_image(image), label=label, note=one.note)
