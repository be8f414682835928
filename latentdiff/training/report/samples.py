"""The sheets of a run on a page: a slider over the steps; and several runs, prompt by prompt."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from latentdiff.html import figure, grid, inline_image, render_template
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
.prompt {{ margin: .9rem 0 .2rem; font-size: .85rem; overflow-wrap: anywhere }}
"""
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

    The images of the first run's first sheet come before them: no training yet.
    """
    with_sheets = [run for run in runs if run.sheets]
    if len(with_sheets) < 2:
        return Markup("")
    last = {run.name: _generated(run.sheets[max(run.sheets)]) for run in with_sheets}
    shared = [p for p in next(iter(last.values())) if all(p in tiles for tiles in last.values())]
    if not shared:
        return Markup('<p class="soft">The runs have no prompt in common.</p>')
    first = _generated(with_sheets[0].sheets[min(with_sheets[0].sheets)])
    rows = []
    for prompt in shared:
        columns = {
            f"{run.name}, step {max(run.sheets):,}": last[run.name][prompt] for run in with_sheets
        }
        if prompt in first and min(with_sheets[0].sheets) == 0:
            columns = {f"{with_sheets[0].name}, before": first[prompt], **columns}
        shown = grid(figure(_shown(image), label=label) for label, image in columns.items())
        rows.append(
            render_template(
                '<p class="prompt">{{ prompt }}</p>{{ shown }}', prompt=prompt, shown=shown
            )
        )
    return Markup().join(rows)


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
            note=f"nearest: {tile.label}" if tile.is_nearest else "",
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
