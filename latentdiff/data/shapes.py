"""The built-in captioned world: flat coloured shapes on flat backgrounds.

Every image is described in full by its caption, so prompt following can be measured: a tenth
of all (kind, colour, size, background) combinations is never shown in training, and an image asked
for by such a caption shows whether the parts of a caption were understood or only memorised. The
same holds for two shapes: a tenth of all pairs of coloured kinds is never shown together. In the
style "smiling" each shape has a face: something new to teach a model that knows the plain ones.
Drawing is deterministic in (seed, index). This module knows nothing of models or training.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (245, 215, 40),
    "purple": (145, 45, 185),
    "orange": (245, 130, 25),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "pink": (255, 185, 205),
    "cyan": (125, 220, 230),
    "teal": (0, 110, 115),
    "brown": (105, 65, 40),
}
SIZES = {"small": 15 / 64, "large": 25 / 64}  # radius as a fraction of the image's side
RELATIONS = ("left of", "right of", "above", "below")
PAIR_SIZES = {"small": 10.5 / 64, "large": 14.5 / 64}  # the same for a shape of two
STYLES = ("smiling",)
FACE_KINDS = ("circle", "square", "triangle", "cross")  # with room for a face
INK, SHINE = (20, 20, 20), (250, 250, 250)
FACE_DOWN = {"triangle": 0.22}  # how far below the centre a face lies, in radii
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """What one image shows: a shape, or two shapes and how the first lies to the second."""

    kind: str
    colour: str
    size: str
    background: str
    relation: str | None = None
    other_kind: str | None = None
    other_colour: str | None = None
    other_size: str | None = None
    style: str | None = None

    @property
    def caption(self) -> str:
        """Return the sentence that says everything about the scene."""
        ground = f"on a {self.background} background"
        if self.relation is None:
            style = f"{self.style} " if self.style else ""
            return f"a {style}{self.size} {self.colour} {self.kind} {ground}"
        first = f"a {self.size} {self.colour} {self.kind}"
        second = f"a {self.other_size} {self.other_colour} {self.other_kind}"
        return f"{first} {self.relation} {second} {ground}"


def all_scenes() -> list[Scene]:
    """Return every single-shape scene: 6 kinds x 6 colours x 2 sizes x 7 backgrounds = 504."""
    return [Scene(*parts) for parts in product(KINDS, COLOURS, SIZES, BACKGROUNDS)]


def split_scenes(*, heldout: float = 0.1, seed: int = 0) -> tuple[list[Scene], list[Scene]]:
    """Return (seen, held-out) single-shape scenes; a scene is one combination of attributes."""
    scenes = all_scenes()
    order = np.random.default_rng([seed, 504]).permutation(len(scenes))
    num_heldout = round(heldout * len(scenes))
    chosen = set(order[:num_heldout].tolist())
    seen = [scene for i, scene in enumerate(scenes) if i not in chosen]
    return seen, [scenes[i] for i in sorted(chosen)]


@cache
def heldout_pairs(*, heldout: float = 0.1, seed: int = 0) -> frozenset[frozenset[tuple[str, str]]]:
    """Return the pairs of coloured kinds never shown together, as {(circle, red), (star, blue)}.

    They are a share `heldout` of all 666; a coloured kind next to itself is a set of one.
    """
    kinds = list(product(KINDS, COLOURS))
    pairs = [frozenset(pair) for pair in combinations_with_replacement(kinds, 2)]
    order = np.random.default_rng([seed, len(pairs)]).permutation(len(pairs))
    return frozenset(pairs[i] for i in order[: round(heldout * len(pairs))].tolist())


def sample_pair(rng: np.random.Generator, *, is_heldout: bool, seed: int = 0) -> Scene:
    """Draw a scene of two shapes whose coloured kinds are, or are not, a held-out pair.

    seed: that of `heldout_pairs`; all else is drawn uniformly from rng.
    """
    unseen = heldout_pairs(seed=seed)
    while True:
        values = (KINDS, tuple(COLOURS), tuple(PAIR_SIZES))
        first, other = ([one[int(rng.integers(len(one)))] for one in values] for _ in range(2))
        if (frozenset({(first[0], first[1]), (other[0], other[1])}) in unseen) == is_heldout:
            break
    grounds = tuple(BACKGROUNDS)
    kind, colour, size = first
    return Scene(
        kind,
        colour,
        size,
        background=grounds[int(rng.integers(len(grounds)))],
        relation=RELATIONS[int(rng.integers(len(RELATIONS)))],
        other_kind=other[0],
        other_colour=other[1],
        other_size=other[2],
    )


def in_style(scenes: Sequence[Scene], style: str) -> list[Scene]:
    """Return the large shapes with room for it in a style: "smiling", which gives them a face.

    Large, so that a VAE of factor 8 keeps the face at 64 px. ValueError for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r}, expected one of: {', '.join(STYLES)}")
    fit = [scene for scene in scenes if scene.size == "large" and scene.kind in FACE_KINDS]
    return [replace(scene, style=style) for scene in fit]


def render(
    scene: Scene,
    rng: np.random.Generator,
    *,
    size_px: int = 64,
    sizes: Mapping[str, float] = SIZES,
) -> Image.Image:
    """Draw a scene with a random place (and radii jittered by 4 %). RGB, size_px x size_px.

    sizes: radii of a single shape as fractions of the side, by name.
    """
    side = size_px * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    if scene.relation is None:
        radius = sizes[scene.size] * rng.uniform(0.96, 1.04)
        room = 0.5 - radius - 1 / 64
        x, y = 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room)
        _draw_shape(draw, scene.kind, COLOURS[scene.colour], x=x, y=y, radius=radius, side=side)
        if scene.style is not None:
            y += FACE_DOWN.get(scene.kind, 0.0) * radius
            _draw_face(draw, x=x * side, y=y * side, radius=radius * side)
    else:
        _draw_pair(draw, scene, rng, side=side)
    return image.resize((size_px, size_px), Image.Resampling.BOX)


def write_shapes(
    root: str | Path,
    *,
    num_train: int = 4000,
    num_test: int = 200,
    size_px: int = 64,
    pair_fraction: float = 0.0,
    style: str | None = None,
    plain_fraction: float = 0.0,
    seed: int = 0,
) -> Path:
    """Write root/{train,test}/ with metadata.jsonl and PNG images; return root.

    train shows the seen combinations, test the held-out ones; `pair_fraction` of the images show
    two shapes and a relation. style: as of `in_style`, and without pairs, which are too small for
    it; `plain_fraction` of the images then show any shape without it, so that a model learns what
    the style's name means. Raises FileExistsError when root holds other files, ValueError for a
    style or pairs that cannot be drawn.
    """
    if style is not None and pair_fraction:
        raise ValueError(f"pair_fraction={pair_fraction}, expected 0 with style={style!r}")
    if style is None and plain_fraction:
        raise ValueError(f"plain_fraction={plain_fraction}, expected 0 without a style")
    root, stamp = Path(root), Path(root) / "shapes.json"
    sizes = {"num_train": num_train, "num_test": num_test, "size_px": size_px}
    settings: dict[str, float | str] = {**sizes, "pair_fraction": pair_fraction, "seed": seed}
    settings |= {} if style is None else {"style": style}
    settings |= {"plain_fraction": plain_fraction} if plain_fraction else {}
    if stamp.exists() and json.loads(stamp.read_text()) == settings:
        return root
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty and holds other shapes; choose a new folder")
    seen, unseen = split_scenes(seed=seed)
    for split, plain, count in (("train", seen, num_train), ("test", unseen, num_test)):
        scenes = plain if style is None else in_style(plain, style)
        rng = np.random.default_rng([seed, len(scenes)])
        if style is None:
            other = partial(sample_pair, rng, is_heldout=split == "test", seed=seed)
        else:
            other = partial(_pick, plain, rng)
        stream = _stream(
            scenes, count, other=other, fraction=pair_fraction or plain_fraction, rng=rng
        )
        _write_split(root / split, stream, rng=rng, size_px=size_px)
    stamp.write_text(json.dumps(settings))
    return root


def _stream(
    scenes: list[Scene],
    count: int,
    *,
    other: Callable[[], Scene],
    fraction: float,
    rng: np.random.Generator,
) -> Iterator[Scene]:
    """Yield `count` scenes: all combinations in turn, a fraction replaced by others."""
    for i in range(count):
        yield other() if rng.random() < fraction else scenes[i % len(scenes)]


def _pick(scenes: Sequence[Scene], rng: np.random.Generator) -> Scene:
    return scenes[int(rng.integers(len(scenes)))]


def _write_split(
    folder: Path, scenes: Iterator[Scene], *, rng: np.random.Generator, size_px: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for i, scene in enumerate(scenes):
            name = f"{i:05d}.png"
            render(scene, rng, size_px=size_px).save(folder / name)
            row = {"file_name": name, "text": scene.caption}
            row |= {k: v for k, v in asdict(scene).items() if v is not None}
            lines.write(json.dumps(row) + "\n")


def _draw_pair(
    draw: ImageDraw.ImageDraw, scene: Scene, rng: np.random.Generator, *, side: int
) -> None:
    """Draw two shapes apart along one axis, as the relation says, at least 4/64 between them."""
    first, second = (
        (kind, colour, PAIR_SIZES[size] * rng.uniform(0.96, 1.04))
        for kind, colour, size in (
            (scene.kind, scene.colour, scene.size),
            (str(scene.other_kind), str(scene.other_colour), str(scene.other_size)),
        )
    )
    if scene.relation in ("right of", "below"):
        first, second = second, first
    radii = first[2], second[2]
    room = 1 - 2 * sum(radii) - 6 / 64  # to share out: before, between and after the two
    before, after = rng.dirichlet((1, 1, 1))[:2] * room
    along = 1 / 64 + before + radii[0], 63 / 64 - after - radii[1]
    for (kind, colour, radius), place in zip((first, second), along, strict=True):
        across = 0.5 + rng.uniform(-0.12, 0.12)
        x, y = (place, across) if scene.relation in ("left of", "right of") else (across, place)
        _draw_shape(draw, kind, COLOURS[colour], x=x, y=y, radius=radius, side=side)


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    kind: str,
    colour: tuple[int, int, int],
    *,
    x: float,
    y: float,
    radius: float,
    side: int,
) -> None:
    """Draw one shape; x, y, radius are fractions of the side, colour is RGB."""
    cx, cy, r = x * side, y * side, radius * side
    if kind in ("circle", "ring"):
        width = 0 if kind == "circle" else round(0.42 * r)
        fill = colour if kind == "circle" else None
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill, outline=colour, width=width)
        return
    draw.polygon([(cx + r * px, cy + r * py) for px, py in _outline(kind)], fill=colour)


def _draw_face(draw: ImageDraw.ImageDraw, *, x: float, y: float, radius: float) -> None:
    """Draw two dark eyes and a bright open mouth around (x, y), pixels of the canvas.

    Plain areas of several pixels, since outlines and pupils would be lost in latents.
    """
    for over in (-0.28, 0.28):
        draw.ellipse(_box(x + over * radius, y - 0.2 * radius, 0.18 * radius), fill=INK)
    draw.chord(_box(x, y + 0.06 * radius, 0.44 * radius), 0, 180, fill=SHINE)


def _box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return (x - radius, y - radius, x + radius, y + radius)


def _outline(kind: str) -> list[tuple[float, float]]:
    """Return the corners of a shape of radius 1 around the origin, y pointing down."""
    if kind == "square":
        a = 0.88
        return [(-a, -a), (a, -a), (a, a), (-a, a)]
    if kind == "triangle":
        return [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    if kind == "star":
        corners = [(1.0 if i % 2 == 0 else 0.42, math.pi * (i / 5 - 0.5)) for i in range(10)]
        return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in corners]
    if kind == "cross":
        a, b = 1.0, 0.33
        right = [(b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a)]
        return right + [(-px, -py) for px, py in right]
    raise ValueError(f"unknown kind of shape {kind!r}; known: {', '.join(KINDS)}")
