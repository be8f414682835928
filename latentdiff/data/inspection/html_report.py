"""A report as one HTML file with thumbnails: no scripts, nothing fetched, all text escaped."""

import base64
import io
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from latentdiff.atomic import write_text
from latentdiff.data.folder.folder import Folder
from latentdiff.data.folder.problems import SEVERITIES, printable
from latentdiff.data.images import ImageError, ImageSource, load_thumbnail
from latentdiff.data.inspection.inspect import DataReport
from latentdiff.data.inspection.statistics import BucketRow, CaptionStats
from latentdiff.data.inspection.text_report import (
    SEVERITY_TITLES,
    alike_sections,
    leak_text,
    size_text,
    time_text,
)

NUM_SAMPLES, NUM_GROUPS, NUM_ALIKE, NUM_NAMES, NUM_IMAGES = 24, 12, 4, 200, 6
SIDE = 128  # of a thumbnail in pixels
MAX_CAPTION = 90  # letters under a thumbnail
SHOWABLE = (
    *("too_small", "aspect_ratio", "no_caption", "unlisted"),
    *("animated", "wrong_extension", "turned"),
)
GONE = '<span class="soft">cannot be shown</span>'
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a7d3f; --bad: #b3261e }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
td:first-child:not(.n) { min-width: 9rem }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.badge { color: white; border-radius: .3rem; padding: .1rem .5rem; font-size: .9rem }
.good { background: var(--good) } .bad { background: var(--bad) }
.grid { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: 128px }
figcaption, figcaption .soft { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere }
.group { border: 1px solid var(--line); border-radius: .3rem; padding: .4rem }
img { background: var(--soft); border-radius: .2rem; display: block; max-width: 128px }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 5rem }
.bars div { flex: 1; background: #4a7bd0; min-height: 1px } .ends { display: flex;
  justify-content: space-between; font-size: .8rem } .soft { opacity: .7; font-size: .85rem }
del { color: var(--bad) } details ul { margin: .3rem 0; padding-left: 1.2rem; font-size: .85rem }
"""


def write_report_html(report: DataReport, folder: Folder, *, path: Path | str) -> None:
    """Write the report to `path`, replacing what is there at once."""
    write_text(path, report_as_html(report, folder))


def report_as_html(report: DataReport, folder: Folder) -> str:
    """Show a report and images of its folder as an HTML page."""
    parts = [
        _headline(report),
        _section("Images", _samples(folder)),
        _section("Problems", _problems(report, folder)),
        _section("Sizes", _sizes(folder)),
        _section("Captions", _captions(report.captions)),
        _section("Buckets of the training images", _buckets(report.buckets, folder)),
        _section("Alike", _alike(report, folder)),
        _section("Cost", _cost(report)),
    ]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_safe(Path(report.root).name)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _safe(text: object) -> str:
    return escape(printable(str(text)))


def _section(title: str, body: str) -> str:
    return f"<h2>{_safe(title)}</h2>{body}" if body else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: set[int]) -> str:
    """Lay out cells that are HTML already; `numbers` are the columns set to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="n"' if place in numbers else "" for place in range(len(cells))]
        inner = (f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _headline(report: DataReport) -> str:
    kind, word = ("good", "usable") if report.is_usable else ("bad", "not usable")
    splits = " + ".join(f"{num:,} {name}" for name, num in report.splits.items() if num)
    counts = f"{report.num_usable:,} of {report.num_found:,} images are usable: {splits}"
    reasons = [*report.why_not, *filter(None, [leak_text(report)])]
    why = "".join(f"<li>{_safe(reason)}</li>" for reason in reasons)
    badge = f'<span class="badge {kind}">{word}</span>'
    return f"<h1>{_safe(report.root)} {badge}</h1><p>{_safe(counts)}</p><ul>{why}</ul>"


def _samples(folder: Folder) -> str:
    places = np.unique(np.linspace(0, len(folder) - 1, NUM_SAMPLES).astype(int))
    records = [folder[int(place)] for place in places] if len(folder) else []
    return _grid(
        _figure(_record_thumbnail(folder, record.id), record.id, _short(record.captions[0]))
        for record in records
    )


def _short(caption: str) -> str:
    return textwrap.shorten(caption, MAX_CAPTION, placeholder=" …")


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _figure(image: str, name: str, text: str = "") -> str:
    caption = f"{_safe(text)}<br>" if text else ""
    name = f'<span class="soft">{_safe(name)}</span>'
    return f"<figure>{image}<figcaption>{caption}{name}</figcaption></figure>"


def _record_thumbnail(folder: Folder, record_id: str) -> str:
    try:
        return _thumbnail(io.BytesIO(folder.read_bytes_of(record_id)))
    except OSError:
        return GONE


def _thumbnail(source: ImageSource) -> str:
    try:
        return _img(load_thumbnail(source, side=SIDE))
    except (ImageError, OSError):
        return GONE


def _img(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img alt="" {size} src="data:image/jpeg;base64,{data}">'


def _problems(report: DataReport, folder: Folder) -> str:
    rows = []
    for severity in SEVERITIES:
        for key, problem in report.problems.items():
            if problem["severity"] != severity:
                continue
            names = [example["where"] for example in problem["examples"]]
            lines = [
                f"<li>{_safe(e['where'])}{': ' if e['detail'] else ''}{_safe(e['detail'])}</li>"
                for e in problem["examples"][:NUM_NAMES]
            ]
            more = problem["count"] - len(lines)
            lines += [f"<li>and {more:,} more</li>"] if more else []
            is_open = " open" if len(lines) <= 10 else ""
            shown = f"<details{is_open}><summary>names</summary><ul>{''.join(lines)}</ul></details>"
            if key in SHOWABLE:
                files = [folder.root / name for name in names[:NUM_IMAGES]]
                shown += _grid(_thumbnail(file) for file in files)
            fix = f'<br><span class="soft">{_safe(problem["fix"])}</span>' if problem["fix"] else ""
            title = f"{_safe(problem['title'])}{fix}"
            rows.append([SEVERITY_TITLES[severity], title, f"{problem['count']:,}", shown])
    head = ["", "reason", "count", "where"]
    return _table(head, rows, numbers={2}) if rows else "<p>none</p>"


def _sizes(folder: Folder) -> str:
    if not len(folder):
        return ""
    shorter = np.minimum(folder.widths, folder.heights)
    aspect = np.log2(folder.widths / folder.heights)
    sides = [f"{shorter.min()} px", "shorter side", f"{shorter.max()} px"]
    shapes = [f"{2 ** aspect.min():.2f}", "width : height", f"{2 ** aspect.max():.2f}"]
    return _bars(shorter, sides) + _bars(aspect, shapes)


def _bars(numbers: np.ndarray, labels: Sequence[str]) -> str:
    if numbers.min() == numbers.max():
        return f"<p>{_safe(labels[1])}: {_safe(labels[0])}, all of them</p>"
    counts, _ = np.histogram(numbers, bins=32)
    heights = 100 * counts / counts.max()
    bars = "".join(f'<div style="height:{height:.1f}%"></div>' for height in heights)
    ends = "".join(f"<span>{_safe(label)}</span>" for label in labels)
    return f'<div class="bars">{bars}</div><div class="ends">{ends}</div>'


def _captions(captions: CaptionStats | None) -> str:
    if captions is None:
        return ""
    tokens = captions.tokens
    counts = f"{captions.num_captions:,} captions, {captions.num_different:,} different"
    counts += f", {captions.num_empty:,} empty; "
    counts += (
        "tokens were not counted: no tokenizer was given"
        if tokens is None
        else f"{tokens.spread.least:.0f} to {tokens.spread.most:.0f} tokens, median "
        f"{tokens.spread.median:.0f}; {tokens.num_over:,} over the limit of {tokens.limit}"
    )
    body = f"<p>{_safe(counts)}</p>"
    if tokens is not None and tokens.worst:
        rows = [
            [_safe(long.id), str(long.num_tokens), _with_cut(long.caption, long.cut)]
            for long in tokens.worst
        ]
        body += _table(["image", "tokens", "caption, what is cut off"], rows, numbers={1})
    if captions.repeated:
        rows = [[f"{times:,}", _safe(caption)] for caption, times in captions.repeated]
        body += _table(["times", "repeated caption"], rows, numbers={0})
    return body


def _with_cut(caption: str, cut: str) -> str:
    kept = caption[: len(caption) - len(cut)] if cut and caption.endswith(cut) else caption
    return _safe(kept) + (f"<del>{_safe(cut)}</del>" if cut else "")


def _buckets(rows: Sequence[BucketRow], folder: Folder) -> str:
    head = ["", "width x height", "images", "batches", "last batch", "repeated", "enlarged"]
    head += ["cut off", "at worst"]
    lines = [
        [
            _cut_image(folder, row),
            f"{row.width} x {row.height}",
            *(f"{n:,}" for n in (row.num_images, row.num_batches, row.last_batch)),
            *(f"{n:,}" for n in (row.num_repeats, row.num_enlarged)),
            f"{row.mean_cut:.1%}",
            f"{row.worst_cut:.1%}",
        ]
        for row in rows
    ]
    note = '<p class="soft">No image is dropped. Shown: the image cut most, cut part dimmed.</p>'
    return note + _table(head, lines, numbers=set(range(1, 9))) if lines else ""


def _cut_image(folder: Folder, row: BucketRow) -> str:
    """Show an image with what the bucket's centre crop cuts off dimmed."""
    try:
        data = folder.read_bytes_of(row.worst_id)
        image = load_thumbnail(io.BytesIO(data), side=SIDE)
    except (ImageError, OSError):
        return GONE
    aspect = row.width / row.height
    width = min(image.width, round(image.height * aspect))
    height = min(image.height, round(image.width / aspect))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    box = (left, top, left + width, top + height)
    shown = Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.75)
    shown.paste(image.crop(box), box)
    return _img(shown)


def _alike(report: DataReport, folder: Folder) -> str:
    if report.alike is None:
        return "<p>not looked for</p>"
    body = "" if report.alike else "<p>no image looks like another</p>"
    for title, groups in alike_sections(report.alike):
        body += f"<p>{_safe(title)} ({len(groups):,})</p>"
        body += '<div class="grid">'
        for group in groups[:NUM_GROUPS]:
            names = group.ids[:NUM_ALIKE]
            figures = (_figure(_record_thumbnail(folder, name), name) for name in names)
            body += f'<div class="group">{_grid(figures)}</div>'
        body += "</div>"
    return body


def _cost(report: DataReport) -> str:
    plan = report.plan
    if plan is None:
        return ""
    encoded = (
        "the VAE was not measured"
        if plan.encode_rate is None
        else f"{plan.encode_rate:,.1f} images/s encoded"
    )
    rows = [
        ["steps an epoch", f"{plan.steps_per_epoch:,} in batches of {plan.batch_size}"],
        ["cached latents", size_text(plan.latent_bytes)],
        ["cached text states", size_text(plan.text_bytes)],
        ["rates", f"{plan.load_rate:,.0f} images/s loaded, {encoded}"],
        ["time to read all once", time_text(plan.seconds)],
    ]
    return _table(["", ""], rows, numbers=set())
