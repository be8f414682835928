"""The sheets of a run on a page: a slider over the steps; and several runs, prompt by prompt."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from latentdiff.html import figure, inline_image, render_template
from latentdiff.image_grid import TILES
from latentdiff.training.report.run_record import RunRecord

MAX_SHEETS = 12  # of a run, evenly spaced, the first and the last among them
SIDE, SHEET_WIDTH = 256, 1600  # pixels of an image, of a sheet whose images cannot be told apart
MAX_CAPTION = 80  # letters under an image
_CHECKED = ", ".join(
    f".slider input:nth-of-type({k}):checked ~ .panels > :nth-child({k})"
    for k in range(1, MAX_SHEETS + 1)
)
STYLE = f"""
.slider input {{ position: absolute; opacity: 0; width: 1px }} .slider label {{ cursor: pointer;
  display: inline-block; padding: .15rem .6rem; margin: 0 .25rem .4rem 0; border-radius: 1rem;
  border: 1px solid var(--line); font-size: .85rem; font-variant-numeric: tabular-nums }}
.slider input:checked + label {{ background: #3b76d6; border-color: #3b76d6; color: white }}
.slider input:focus-visible + label {{ outline: 2px solid #3b76d6; outline-offset: 2px }}
.panels > * {{ display: none }} {_CHECKED} {{ display: block }}
.samples {{ grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); display: grid }}
.samples figure {{ width: auto; min-width: 0 }} .samples img {{ max-width: 100%; width: 100% }}
.pixels img {{ image-rendering: pixelated }} img.sheet {{ max-width: 100% }}
.prompts {{ display: grid; gap: .8rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)) }}
.prompts p {{ margin: 0 0 .2rem; font-size: .85rem; overflow-wrap: anywhere }}
.row {{ display: grid; gap: .4rem }} .row figure {{ width: auto; min-width: 0 }}
.row img {{ width: 100%; max-width: 100% }}
"""
PROMPTS = """\
<div class="prompts">{% for prompt, images in rows %}<div><p>{{ prompt }}</p><div class="row" \
style="grid-template-columns: repeat({{ images | length }}, minmax(0, 160px))">\
{% for image in images %}{{ image }}{% endfor %}</div></div>{% endfor %}</div>"""
SLIDER = """\
<div class="slider">{% for step, _ in panels %}<input type="radio" name="{{ name }}" \
id="{{ name }}-{{ step }}"{% if loop.last %} checked{% endif %}><label \
for="{{ name }}-{{ step }}">{{ "step " if loop.first }}{{ "{:,}".format(step) }}</label>\
{% endfor %}<div class="panels">{% for _, panel in panels %}<div>{{ panel }}</div>{% endfor %}\
</div></div>"""


@dataclass(frozen=True)
class Tile:
    """An image of a sheet: its prompt, or the file that is the nearest training image."""

    image: Image.Image
    label: str
    is_nearest: bool


def sheet_slider(run: RunRecord, *, name: str) -> Markup:
    """Show a run's sheets, one at a time, by a step's button or the arrow keys. name: unique."""
    if not run.sheets:
        return Markup("")
    steps = _chosen(list(run.sheets))
    panels = [(step, _panel(run.sheets[step])) for step in steps]
    return render_template(SLIDER, name=name, panels=panels)


def side_by_side(runs: Sequence[RunRecord]) -> Markup:
    """Show the last images of several runs next to each other, for the prompts that all have.

    The images of the first run's first sheet come before them, where it precedes training.
    """
    runs = [run for run in runs if run.sheets]
    if len(runs) < 2:
        return Markup("")
    sheets = {f"{run.name}, step {max(run.sheets):,}": run.sheets[max(run.sheets)] for run in runs}
    columns = {label: _generated(path) for label, path in sheets.items()}
    shared = [
        prompt
        for prompt in next(iter(columns.values()))
        if all(prompt in images for images in columns.values())
    ]
    if not shared:
        return Markup('<p class="soft">The runs have no prompt in common.</p>')
    if 0 in runs[0].sheets:
        columns = {f"{runs[0].name}, before": _generated(runs[0].sheets[0]), **columns}
    return _prompt_rows(columns, shared)


def before_and_after(run: RunRecord) -> Markup:
    """Show a run's first images, where they precede training, next to its last."""
    if 0 not in run.sheets or not (last := max(run.sheets)):
        return Markup("")
    before, after = _generated(run.sheets[0]), _generated(run.sheets[last])
    shared = [prompt for prompt in after if prompt in before]
    columns = {"before": before, f"step {last:,}": after}
    return _prompt_rows(columns, shared) if shared else Markup("")


def _prompt_rows(
    columns: Mapping[str, Mapping[str, Image.Image]], prompts: Sequence[str]
) -> Markup:
    """Show each prompt's image of every column, a labelled set of images by prompt."""
    rows = [
        (
            prompt,
            [
                figure(_shown(images[prompt]), label=label)
                for label, images in columns.items()
                if prompt in images
            ],
        )
        for prompt in prompts
    ]
    return render_template(PROMPTS, rows=rows)


def tiles_of(path: Path) -> list[Tile]:
    """Return the images of a sheet; none where its file does not say where they are."""
    with Image.open(path) as sheet:
        sheet.load()
        try:
            found = json.loads(getattr(sheet, "text", {}).get(TILES, "[]"))
            return [
                Tile(sheet.crop(tuple(one["box"])), str(one["label"]), bool(one["is_nearest"]))
                for one in found
            ]
        except (ValueError, TypeError, KeyError):
            return []


def _chosen(steps: list[int]) -> list[int]:
    """Return at most MAX_SHEETS of the steps, evenly, with the first and the last."""
    if len(steps) <= MAX_SHEETS:
        return steps
    return [steps[round(k * (len(steps) - 1) / (MAX_SHEETS - 1))] for k in range(MAX_SHEETS)]


def _generated(path: Path) -> dict[str, Image.Image]:
    return {tile.label: tile.image for tile in tiles_of(path) if not tile.is_nearest}


def _panel(path: Path) -> Markup:
    """Show a sheet image by image, so that they wrap on a phone; whole where that cannot be."""
    tiles = tiles_of(path)
    if not tiles:
        with Image.open(path) as sheet:
            whole = sheet.convert("RGB")
        whole.thumbnail((SHEET_WIDTH, SHEET_WIDTH))
        return inline_image(whole, format="JPEG", kind="sheet")
    items = [
        figure(
            _shown(tile.image),
            label=""
            if tile.is_nearest
            else textwrap.shorten(tile.label, MAX_CAPTION, placeholder=" …"),
            note=tile.label if tile.is_nearest else "",
        )
        for tile in tiles
    ]
    return render_template(
        '<div class="grid samples">{{ items }}</div>', items=Markup().join(items)
    )


def _shown(image: Image.Image) -> Markup:
    """Inline an image of at most SIDE pixels; one that a sheet enlarged is enlarged no further."""
    if max(image.size) > SIDE:
        image = image.copy()
        image.thumbnail((SIDE, SIDE))
    return inline_image(image.convert("RGB"), format="JPEG")
