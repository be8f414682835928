"""Composite scenes: drawings on white, recoloured, counted and placed next to each other.

A model that sees each thing alone cannot learn what "two apples", "a blue car" or "a cat left of a
dog" ask for. Here the drawings of a captioned folder are combined into images that show it, each
described in full by its caption. Drawing is deterministic in (seed, index).
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from latentdiff.atomic import atomic_folder

T = TypeVar("T")
HUES = {  # degrees of HSV, and least saturation and value at which the name fits
    "red": (0, 0.6, 0.6),
    "orange": (28, 0.7, 0.85),
    "yellow": (52, 0.6, 0.9),
    "green": (125, 0.5, 0.5),
    "blue": (222, 0.6, 0.6),
    "purple": (278, 0.5, 0.5),
    "pink": (335, 0.3, 0.9),
}
COLOURS = (*HUES, "black", "white", "brown", "gray", "grey")  # words that say a colour
RELATIONS = ("left of", "right of", "above", "below", "next to", "and")
COUNTS = {2: "two", 3: "three"}
SUBJECT = re.compile(r"(?:a|an) ((?:[a-z]+ ){0,2}[a-z]+)")
WHITE = 243  # a pixel whose channels all reach it belongs to the background
MIN_COLOURED = 0.45  # of a drawing's pixels have its dominant hue, for a recoloured one
GAP = 4 / 128  # of the side, between drawings and to the border


@dataclass(frozen=True)
class Drawing:
    """A thing on white: `noun` without article or colour ("cat face"), `style` or "", its image."""

    noun: str
    style: str
    path: Path

    def cut_out(self) -> Image.Image:
        """Return the part of the image that is not background. RGB."""
        image = Image.open(self.path).convert("RGB")
        rows, columns = np.nonzero((np.asarray(image) < WHITE).any(axis=2))
        if not len(rows):
            return image
        return image.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))


def read_drawings(folder: str | Path) -> list[Drawing]:
    """Return the drawings of a split's folder whose subject is one thing: "a cat", "a red apple".

    The subject is the row's `subject`, or its text; the style its `style_text`, if any. Raises
    FileNotFoundError where folder/metadata.jsonl is not there.
    """
    rows = (Path(folder) / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    found = [_drawing(json.loads(row), Path(folder)) for row in rows]
    return [one for one in found if one is not None]


def _drawing(row: dict[str, Any], folder: Path) -> Drawing | None:
    match = SUBJECT.fullmatch(row.get("subject") or row["text"])
    words = [word for word in match[1].split() if word not in COLOURS] if match else []
    if not words or len(words) > 2:
        return None
    return Drawing(" ".join(words), row.get("style_text", ""), folder / row["file_name"])


def write_composites(
    out: str | Path,
    folders: Sequence[str | Path],
    *,
    num_images: int = 6000,
    size_px: int = 128,
    seed: int = 0,
) -> Path:
    """Write out/train/ with metadata.jsonl and num_images PNG images; return out.

    A third each shows one recoloured drawing, two or three of a kind, and two things in a relation,
    half of these recoloured too. folders: splits' folders, as of `read_drawings`. `out` appears
    whole or not at all. Raises FileExistsError where it is there, ValueError without drawings, or
    without one that can be recoloured.
    """
    drawings = [one for folder in folders for one in read_drawings(folder)]
    if not drawings:
        raise ValueError(f"no row of {', '.join(map(str, folders))} has a subject such as 'a cat'")
    if not any(recolour(one.cut_out(), "red") for one in drawings):
        raise ValueError("no drawing has one dominant colour, so none can be recoloured")
    by_noun: dict[str, list[Drawing]] = {}
    for drawing in drawings:
        by_noun.setdefault(drawing.noun, []).append(drawing)
    things = list(by_noun.values())  # a noun is as likely as another, however often it is drawn
    with atomic_folder(Path(out)) as temporary:
        (temporary / "train").mkdir()
        with (temporary / "train" / "metadata.jsonl").open("w", encoding="utf-8") as lines:
            for i in range(num_images):
                rng = np.random.default_rng([seed, i])
                image, caption, used = KINDS[i % len(KINDS)](things, rng, size_px)
                name = f"{i:05d}.png"
                image.save(temporary / "train" / name)
                row = {"file_name": name, "text": caption, **_captions(caption, used)}
                lines.write(json.dumps(row) + "\n")
    return Path(out)


def _captions(caption: str, used: Sequence[Drawing]) -> dict[str, Any]:
    """Return the other columns of a row: all captions, and the drawings it is made from."""
    styles = {drawing.style for drawing in used} - {""}
    styled = [f"{caption}, {style}" for style in styles] if len(styles) == 1 else []
    return {"captions": [caption, *styled], "made_from": [one.path.name for one in used]}


def _recoloured(
    things: Sequence[Sequence[Drawing]], rng: np.random.Generator, size_px: int
) -> tuple[Image.Image, str, list[Drawing]]:
    """Draw one thing in another colour: "a blue cat"."""
    drawing, image, phrase = _coloured_thing(things, rng)
    return _place([image], [(0.5, 0.5)], 1.0, size_px), phrase, [drawing]


def _counted(
    things: Sequence[Sequence[Drawing]], rng: np.random.Generator, size_px: int
) -> tuple[Image.Image, str, list[Drawing]]:
    """Draw two or three of a kind in one style: "three apples"."""
    drawing = _pick(_pick(things, rng), rng)
    count = int(rng.integers(2, 4))
    layouts = LAYOUTS[count]
    places, cell = layouts[int(rng.integers(len(layouts)))]
    image = _place([drawing.cut_out()] * count, places, cell, size_px)
    return image, f"{COUNTS[count]} {plural(drawing.noun)}", [drawing]


def _related(
    things: Sequence[Sequence[Drawing]], rng: np.random.Generator, size_px: int
) -> tuple[Image.Image, str, list[Drawing]]:
    """Draw two things and say how the first lies to the second: "a cat left of a blue car"."""
    chosen = []
    for _ in range(2):
        if rng.random() < 0.5:
            chosen.append(_coloured_thing(things, rng))
        else:
            drawing = _pick(_pick(things, rng), rng)
            chosen.append((drawing, drawing.cut_out(), with_article(drawing.noun)))
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    flat = [(0.25, 0.5 + rng.uniform(-0.1, 0.1)), (0.75, 0.5 + rng.uniform(-0.1, 0.1))]
    tall = [(y, x) for x, y in flat]
    places = tall if relation in ("above", "below") else flat
    first_is_second = relation in ("right of", "below") or (
        relation in ("next to", "and") and rng.random() < 0.5
    )
    images = [image for _, image, _ in chosen]
    image = _place(images, places[::-1] if first_is_second else places, 0.5, size_px)
    return image, f"{chosen[0][2]} {relation} {chosen[1][2]}", [one for one, _, _ in chosen]


Maker = Callable[
    [Sequence[Sequence[Drawing]], np.random.Generator, int],
    tuple[Image.Image, str, list[Drawing]],
]
KINDS: tuple[Maker, ...] = (_recoloured, _counted, _related)
LAYOUTS: dict[int, list[tuple[list[tuple[float, float]], float]]] = {  # centres, side of a cell
    2: [
        ([(0.25, 0.5), (0.75, 0.5)], 0.5),
        ([(0.28, 0.28), (0.72, 0.72)], 0.48),
        ([(0.72, 0.28), (0.28, 0.72)], 0.48),
        ([(0.5, 0.25), (0.5, 0.75)], 0.5),
    ],
    3: [
        ([(0.5, 0.25), (0.25, 0.75), (0.75, 0.75)], 0.5),
        ([(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)], 0.5),
        ([(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)], 0.34),
    ],
}


def _coloured_thing(
    things: Sequence[Sequence[Drawing]], rng: np.random.Generator
) -> tuple[Drawing, Image.Image, str]:
    """Return a drawing, its recoloured image, and its noun with colour and article."""
    names = list(HUES)
    while True:
        drawing = _pick(_pick(things, rng), rng)
        colour = names[int(rng.integers(len(names)))]
        image = recolour(drawing.cut_out(), colour)
        if image is not None:
            return drawing, image, with_article(f"{colour} {drawing.noun}")


def recolour(image: Image.Image, colour: str) -> Image.Image | None:
    """Turn a drawing's dominant hue to a named colour; other hues, black and white stay.

    image: RGB on white. None where less than MIN_COLOURED of the drawing has one hue. KeyError for
    a colour that HUES does not name.
    """
    target, min_saturation, min_value = HUES[colour]
    pixels = np.asarray(image.convert("HSV"), np.float64)
    hue, saturation, value = pixels[..., 0] * 360 / 255, pixels[..., 1] / 255, pixels[..., 2] / 255
    is_drawn = (np.asarray(image) < WHITE).any(axis=2)
    is_coloured = is_drawn & (saturation > 0.25) & (value > 0.2)
    if not is_coloured.any():
        return None
    histogram = np.bincount((hue[is_coloured] // 10).astype(int) % 36, minlength=36)
    smooth = sum(np.roll(histogram, shift) for shift in (-1, 0, 1))
    dominant = 10.0 * int(np.argmax(smooth)) + 5
    distance = (hue - dominant + 180) % 360 - 180
    is_turned = is_coloured & (np.abs(distance) < 40)
    if is_turned.sum() < MIN_COLOURED * is_drawn.sum():
        return None
    raised = [
        np.clip(part * max(1.0, least / max(float(np.median(part[is_turned])), 1e-3)), 0, 1)
        for part, least in ((saturation, min_saturation), (value, min_value))
    ]
    turned = np.stack([((target + 0.4 * distance) % 360) / 360, *raised], axis=2) * 255
    mixed = np.where(is_turned[..., None], turned, pixels).round().astype(np.uint8)
    return Image.fromarray(mixed, "HSV").convert("RGB")


def _place(
    images: Sequence[Image.Image],
    places: Sequence[tuple[float, float]],
    cell: float,
    size_px: int,
) -> Image.Image:
    """Draw images on white, each fitted into a cell around its place (fractions of the side)."""
    canvas = Image.new("RGB", (size_px, size_px), (255, 255, 255))
    room = (cell - GAP) * size_px
    for image, (x, y) in zip(images, places, strict=True):
        scale = room / max(image.size)
        size = [max(1, round(scale * side)) for side in image.size]
        small = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        left, top = (round(c * size_px - side / 2) for c, side in zip((x, y), size, strict=True))
        canvas.paste(small, (left, top))
    return canvas


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


def with_article(noun: str) -> str:
    """Return "a cat", "an apple", "an umbrella", "a unicorn", and "grapes" as it is."""
    if noun.rsplit(maxsplit=1)[-1] in ALWAYS_PLURAL:
        return noun
    is_vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "us", "uf", "uk"))
    return f"an {noun}" if is_vowel else f"a {noun}"


def plural(noun: str) -> str:
    """Return the plural of an English noun or phrase: "cats", "cherries", "mice", "glasses"."""
    head, _, last = noun.rpartition(" ")
    return f"{head} {_plural(last)}".strip()


ALWAYS_PLURAL = {"glasses", "scissors", "jeans", "pants", "shorts", "grapes", "cherries"}
UNCHANGED = {"fish", "sheep", "deer", *ALWAYS_PLURAL}
IRREGULAR = {
    **{"mouse": "mice", "man": "men", "woman": "women", "child": "children", "tooth": "teeth"},
    **{"foot": "feet", "goose": "geese", "ox": "oxen", "leaf": "leaves", "knife": "knives"},
    **{"loaf": "loaves", "wolf": "wolves", "shelf": "shelves", "person": "people"},
}


def _plural(word: str) -> str:
    if word in UNCHANGED or word.endswith("ies") or (word.endswith("s") and word[-2:] != "ss"):
        return word if not word.endswith("us") else f"{word}es"
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith(("ss", "x", "z", "ch", "sh")) or word in ("tomato", "potato"):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"
