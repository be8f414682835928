"""A data report as one HTML file with thumbnails."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from latentdiff.atomic import write_text
from latentdiff.data.folder.folder import Folder, Record
from latentdiff.data.folder.problems import SEVERITIES
from latentdiff.data.inspection.inspect import DataReport
from latentdiff.data.inspection.pairs import companion_kinds, pair_line
from latentdiff.data.inspection.statistics import (
    BucketRow,
    CaptionStats,
    LongCaption,
    SampleRow,
)
from latentdiff.data.inspection.text_report import (
    SEVERITY_TITLES,
    duplicate_sections,
    leak_text,
    repeats_text,
    size_text,
    time_text,
)
from latentdiff.html import figure, grid, inline_image, page, render_template, table
from latentdiff.image_io import ImageError, ImageSource, load_thumbnail

NUM_SAMPLES, NUM_GROUPS, NUM_IN_GROUP, NUM_NAMES, NUM_IMAGES = 24, 12, 4, 200, 6
SIDE = 128  # of a thumbnail in pixels
MAX_CAPTION = 90  # letters under a thumbnail
SHOWABLE = (
    *("too_small", "aspect_ratio", "no_caption", "unlisted"),
    *("animated", "wrong_extension", "turned"),
    *("black_condition", "equal_condition", "black_inpaint_mask"),
)
GONE = Markup('<span class="soft">cannot be shown</span>')
STYLE = """
.badge { color: white; border-radius: .3rem; padding: .1rem .5rem; font-size: .9rem }
.good { background: var(--good) } .bad { background: var(--bad) }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 5rem }
.bars div { flex: 1; background: #4a7bd0; min-height: 1px } .ends { display: flex;
  justify-content: space-between; font-size: .8rem }
del { color: var(--bad) } details ul { margin: .3rem 0; padding-left: 1.2rem; font-size: .85rem }
"""
BODY = """\
<h1>{{ root }} <span class="badge {{ kind }}">{{ verdict }}</span></h1>
<p>{{ counts }}</p><ul>{% for reason in reasons %}<li>{{ reason }}</li>{% endfor %}</ul>
{% for title, content in sections if content %}<h2>{{ title }}</h2>{{ content }}{% endfor %}"""
TITLE_AND_FIX = '{{ title }}{% if fix %}<br><span class="soft">{{ fix }}</span>{% endif %}'
EXAMPLES = """\
<details{% if num_lines <= 10 %} open{% endif %}><summary>names</summary><ul>
{% for example in examples %}
<li>{{ example.where }}{% if example.detail %}: {{ example.detail }}{% endif %}</li>
{% endfor %}
{% if num_more %}<li>and {{ num_more }} more</li>{% endif %}
</ul></details>{{ thumbnails }}"""
BARS = """\
<div class="bars">{% for height in heights %}<div style="height:{{ height }}%"></div>{% endfor %}
</div><div class="ends">{% for label in labels %}<span>{{ label }}</span>{% endfor %}</div>"""


def write_report_html(report: DataReport, folder: Folder, *, path: Path | str) -> None:
    """Write the report to `path`, replacing what is there at once."""
    write_text(path, report_as_html(report, folder))


def report_as_html(report: DataReport, folder: Folder) -> str:
    """Show a report and images of its folder as an HTML page."""
    splits = " + ".join(f"{num:,} {name}" for name, num in report.splits.items() if num)
    body = render_template(
        BODY,
        root=report.root,
        kind="good" if report.is_usable else "bad",
        verdict="usable" if report.is_usable else "not usable",
        counts=f"{report.num_usable:,} of {report.num_found:,} images are usable: {splits}",
        reasons=[*report.why_not, *filter(None, [leak_text(report)])],
        sections=[
            ("Images", _samples(folder)),
            ("Problems", _problems(report, folder)),
            ("Sizes", _sizes(folder)),
            ("Captions", _captions(report.captions)),
            ("Conditions", _conditions(report)),
            ("Samples of an epoch", _sample_table(report.samples)),
            ("Buckets of the training images", _buckets(report.buckets, folder)),
            ("Duplicates", _duplicates(report, folder)),
            ("Cost", _cost(report)),
        ],
    )
    title = report.root if " + " in report.root else Path(report.root).name
    return page(title, body=body, style=STYLE)


def _samples(folder: Folder) -> Markup:
    if not len(folder):
        return grid([])
    few = folder.select(np.unique(np.linspace(0, len(folder) - 1, NUM_SAMPLES).astype(int)))
    kinds = companion_kinds(folder)
    if not kinds:
        return grid(_record_figure(folder, record) for record in few)
    pairs = [few.companions(kind) for kind in kinds]
    return grid(_pair(few, pairs, index) for index in range(len(few)))


def _record_figure(folder: Folder, record: Record) -> Markup:
    caption = textwrap.shorten(record.captions[0], MAX_CAPTION, placeholder=" …")
    return figure(_record_thumbnail(folder, record.id), label=caption, note=record.id)


def _pair(folder: Folder, pairs: Sequence[tuple[Folder, np.ndarray]], index: int) -> Markup:
    """Show an image and, next to it, its conditions and inpainting masks."""
    figures = [_record_figure(folder, folder[index])]
    for files, starts in pairs:
        for place in range(*starts[index : index + 2].tolist())[:NUM_IN_GROUP]:
            data = io.BytesIO(files.read_bytes(place))
            figures.append(figure(_thumbnail(data), note=files[place].id))
    return Markup('<div class="group">{}</div>').format(grid(figures))


def _record_thumbnail(folder: Folder, record_id: str) -> Markup:
    try:
        return _thumbnail(io.BytesIO(folder.read_bytes_of(record_id)))
    except OSError:
        return GONE


def _thumbnail(source: ImageSource) -> Markup:
    try:
        return inline_image(load_thumbnail(source, side=SIDE), format="JPEG")
    except (ImageError, OSError):
        return GONE


def _problems(report: DataReport, folder: Folder) -> Markup:
    rows = [
        [
            SEVERITY_TITLES[severity],
            render_template(TITLE_AND_FIX, title=problem["title"], fix=problem["fix"]),
            f"{problem['count']:,}",
            _examples(key, problem, folder),
        ]
        for severity in SEVERITIES
        for key, problem in report.problems.items()
        if problem["severity"] == severity
    ]
    head = ["", "reason", "count", "where"]
    return table(head, rows, classes=("", "", "n", "")) if rows else Markup("<p>none</p>")


def _examples(key: str, problem: dict[str, Any], folder: Folder) -> Markup:
    """List the names of a problem's files, with thumbnails where the files can be shown."""
    examples = problem["examples"]
    num_more = problem["count"] - len(examples[:NUM_NAMES])
    names = [example["where"] for example in examples[:NUM_IMAGES]] if key in SHOWABLE else []
    return render_template(
        EXAMPLES,
        examples=examples[:NUM_NAMES],
        num_more=f"{num_more:,}" if num_more else "",
        num_lines=len(examples[:NUM_NAMES]) + bool(num_more),
        thumbnails=grid(_thumbnail(folder.root / name) for name in names) if names else "",
    )


def _sizes(folder: Folder) -> Markup:
    if not len(folder):
        return Markup()
    shorter = np.minimum(folder.widths, folder.heights)
    aspect = np.log2(folder.widths / folder.heights)
    sides = [f"{shorter.min()} px", "shorter side", f"{shorter.max()} px"]
    shapes = [f"{2 ** aspect.min():.2f}", "width : height", f"{2 ** aspect.max():.2f}"]
    return _bars(shorter, sides) + _bars(aspect, shapes)


def _bars(numbers: np.ndarray, labels: Sequence[str]) -> Markup:
    if numbers.min() == numbers.max():
        return Markup("<p>{}: {}, all of them</p>").format(labels[1], labels[0])
    counts, _ = np.histogram(numbers, bins=32)
    heights = [f"{height:.1f}" for height in 100 * counts / counts.max()]
    return render_template(BARS, heights=heights, labels=labels)


def _captions(captions: CaptionStats | None) -> Markup:
    if captions is None:
        return Markup()
    tokens = captions.tokens
    counts = f"{captions.num_captions:,} captions, {captions.num_different:,} different"
    counts += f", {captions.num_empty:,} empty; "
    counts += (
        "tokens were not counted: no tokenizer was given"
        if tokens is None
        else f"{tokens.lengths.min:.0f} to {tokens.lengths.max:.0f} tokens, median "
        f"{tokens.lengths.median:.0f}; {tokens.num_over:,} over the limit of {tokens.limit}"
    )
    body = render_template("<p>{{ counts }}</p>", counts=counts)
    if tokens is not None and tokens.worst:
        rows = [[long.id, long.num_tokens, _with_cut(long)] for long in tokens.worst]
        head = ["image", "tokens", "caption, what is cut off"]
        body += table(head, rows, classes=("", "n", ""))
    if captions.repeated:
        repeated = [[f"{times:,}", caption] for caption, times in captions.repeated]
        body += table(["times", "repeated caption"], repeated, classes=("n", ""))
    return body


def _conditions(report: DataReport) -> Markup:
    return Markup().join(Markup("<p>{}</p>").format(pair_line(one)) for one in report.pairs)


def _with_cut(long: LongCaption) -> Markup:
    caption, cut = long.caption, long.cut
    kept = caption[: len(caption) - len(cut)] if cut and caption.endswith(cut) else caption
    return render_template(
        "{{ kept }}{% if cut %}<del>{{ cut }}</del>{% endif %}", kept=kept, cut=cut
    )


def _sample_table(rows: Sequence[SampleRow]) -> Markup:
    head = ["", "training images", "held out", "each", "samples", "share"]
    lines = []
    for row in rows:
        counts = [f"{n:,}" for n in (row.num_images, row.num_heldout, row.num_samples)]
        lines.append([row.name, *counts[:2], repeats_text(row), counts[2], f"{row.share:.1%}"])
    return table(head, lines, classes=("", *["n"] * 5)) if rows else Markup()


def _buckets(rows: Sequence[BucketRow], folder: Folder) -> Markup:
    head = ["", "width x height", "images", "batches", "last batch", "repeated", "enlarged"]
    head += ["cut off", "at worst"]
    lines = [
        [
            _bucket_thumbnail(folder, row),
            f"{row.width} x {row.height}",
            *(f"{n:,}" for n in (row.num_images, row.num_batches, row.last_batch)),
            *(f"{n:,}" for n in (row.num_repeats, row.num_enlarged)),
            f"{row.mean_crop_loss:.1%}",
            f"{row.max_crop_loss:.1%}",
        ]
        for row in rows
    ]
    note = "No image is dropped. Shown: the image cut most, cut part dimmed."
    note = Markup('<p class="soft">{}</p>').format(note)
    return note + table(head, lines, classes=("", *["n"] * 8)) if lines else Markup()


def _bucket_thumbnail(folder: Folder, row: BucketRow) -> Markup:
    """Show an image with the part that its bucket's centre crop cuts off dimmed."""
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
    return inline_image(shown, format="JPEG")


def _duplicates(report: DataReport, folder: Folder) -> Markup:
    if report.duplicates is None:
        return Markup("<p>not searched</p>")
    body = Markup("" if report.duplicates else "<p>none</p>")
    for title, groups in duplicate_sections(report.duplicates):
        body += Markup("<p>{} ({:,})</p>").format(title, len(groups))
        body += grid(_group(folder, group.ids[:NUM_IN_GROUP]) for group in groups[:NUM_GROUPS])
    return body


def _group(folder: Folder, names: Sequence[str]) -> Markup:
    figures = grid(figure(_record_thumbnail(folder, name), note=name) for name in names)
    return Markup('<div class="group">{}</div>').format(figures)


def _cost(report: DataReport) -> Markup:
    cost = report.cost
    if cost is None:
        return Markup()
    encoded = (
        "the VAE was not measured"
        if cost.encode_rate is None
        else f"{cost.encode_rate:,.1f} images/s encoded"
    )
    rows = [
        ["steps an epoch", f"{cost.steps_per_epoch:,} in batches of {cost.batch_size}"],
        ["cached latents", size_text(cost.latent_bytes)],
        ["cached prompt embeddings", size_text(cost.text_bytes)],
        ["rates", f"{cost.load_rate:,.0f} images/s loaded, {encoded}"],
        ["time to read all once", time_text(cost.seconds)],
    ]
    note = Markup('<p class="soft">{}</p>').format(report.sizes_note) if report.sizes_note else ""
    return table(["", ""], rows) + note
