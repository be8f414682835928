"""The judge of the built-in shapes world: reads a scene back from its image.

Geometry and colour alone, without a network, so a model's prompt-following accuracy does not depend
on another model. Background and colours are the nearest named ones; the outline is normalised by
centroid and area and compared with those that data/shapes.py draws, sharp and soft.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from latentdiff.data.shapes import BACKGROUNDS, COLOURS, KINDS, PAIR_SIZES, SIZES, Scene, render

SIDE = 64  # every image is read at this size
MAX_COLOUR_DISTANCE = 70.0  # of 255, Euclidean in RGB, to the nearest named colour
MIN_CONTRAST = 40.0  # of 255; the palest pair, green on teal, has 87
MIN_AREA = 40.0  # pixels; the smallest shape, a star of radius 12, has 170
MIN_AREA_RATIO = 0.1  # to the largest piece; two shapes of one image have at least 0.15
MIN_IOU = 0.72  # with the best outline; blurred or noisy renderings have 0.8 and more
MIN_LEAD = 0.04  # of the best outline over the second; these renderings have 0.05 and more
MAX_RADIUS_RATIO = 1.3  # to the nearest named size; the middle between two is 1.29, of a pair 1.25
RADII = (*SIZES.values(), *PAIR_SIZES.values())  # those that the outlines are known at
MASK_PX = 40  # side of a normalised mask, which covers 2 REACH sqrt(area)
REACH = 1.1
SOFTNESS_PX = (0.0, 1.25, 2.5)  # blurs of the outlines compared with
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class SceneReading:
    """The scene that an image shows; None is unreadable or absent.

    Of two shapes, the first is the left or upper one; "small" and "large" are then those of pairs.
    """

    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    background: str | None = None
    relation: str | None = None
    other_kind: str | None = None
    other_colour: str | None = None
    other_size: str | None = None


@dataclass(frozen=True)
class _Shape:
    kind: str | None
    colour: str | None
    radius: float  # fraction of the side
    x: float  # centroid, pixels
    y: float


def judge_image(image: Image.Image | np.ndarray) -> SceneReading:
    """Read the scene that an image shows. image: PIL, or uint8 (H, W, 3).

    A kind is named only if its outline overlaps the shape's by MIN_IOU (intersection over union)
    and leads by MIN_LEAD; a size is that of the best outline, named or not. More than two shapes
    leave all but the background unread. Raises ValueError for an array of another form.
    """
    pixels = _pixels(image)
    ground = _ground(pixels)
    blank = SceneReading(background=_nearest(ground, BACKGROUNDS))
    shapes = _in_order(_shapes(pixels, ground))
    if not 1 <= len(shapes) <= 2:
        return blank
    first = shapes[0]
    if len(shapes) == 1:
        return replace(blank, kind=first.kind, colour=first.colour, size=_size(first, SIZES))
    second = shapes[1]
    return SceneReading(
        kind=first.kind,
        colour=first.colour,
        size=_size(first, PAIR_SIZES),
        background=blank.background,
        relation="left of" if _is_beside(first, second) else "above",
        other_kind=second.kind,
        other_colour=second.colour,
        other_size=_size(second, PAIR_SIZES),
    )


def shape_centres(image: Image.Image | np.ndarray) -> list[tuple[float, float]]:
    """Return the centroids (x, y) of an image's shapes, fractions of the side.

    In the order of `judge_image`. image: PIL, or uint8 (H, W, 3). Raises ValueError as that does.
    """
    pixels = _pixels(image)
    return [(one.x / SIDE, one.y / SIDE) for one in _in_order(_shapes(pixels, _ground(pixels)))]


def follows(reading: SceneReading, scene: Scene) -> dict[str, bool]:
    """Tell for each attribute that the scene's caption names, and for "all", whether it is shown.

    Two shapes are read in the order that agrees best: "a left of b" is "b right of a".
    """
    wanted = asdict(scene)
    if scene.relation is None:
        names = ["kind", "colour", "size", "background"]
        orders = [reading]
    else:
        names = ["kind", "colour", "size", "background", "relation"]
        names += ["other_kind", "other_colour", "other_size"]
        orders = [reading, _mirrored(reading)]
    answers = [{name: getattr(order, name) == wanted[name] for name in names} for order in orders]
    best = max(answers, key=lambda answer: sum(answer.values()))
    return {**best, "all": all(best.values())}


def accuracy(
    images: Sequence[Image.Image | np.ndarray], scenes: Sequence[Scene]
) -> dict[str, float]:
    """Return the fraction of images that follow their scene, by attribute and for "all".

    An attribute counts over the scenes that name it. Raises ValueError unless there is one scene
    for each of one or more images.
    """
    if len(images) != len(scenes) or not len(images):
        raise ValueError(
            f"got {len(images)} images and {len(scenes)} scenes; "
            "give one or more images and a scene for each"
        )
    answers: dict[str, list[bool]] = {}
    for image, scene in zip(images, scenes, strict=True):
        for name, is_shown in follows(judge_image(image), scene).items():
            answers.setdefault(name, []).append(is_shown)
    return {name: float(np.mean(shown)) for name, shown in answers.items()}


def _mirrored(reading: SceneReading) -> SceneReading:
    return replace(
        reading,
        kind=reading.other_kind,
        colour=reading.other_colour,
        relation=MIRRORED.get(reading.relation or ""),
        other_kind=reading.kind,
        other_colour=reading.colour,
        size=reading.other_size,
        other_size=reading.size,
    )


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return (SIDE, SIDE, 3) float32 in [0, 255], smoothed against noise."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"an image is a PIL image or a uint8 array (H, W, 3), "
                f"got {image.dtype} {image.shape}"
            )
        image = Image.fromarray(image)
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small.filter(ImageFilter.GaussianBlur(0.7)), np.float32)


def _ground(pixels: np.ndarray) -> np.ndarray:
    """Return the background's colour (3,): the median of the frame, 2 pixels wide."""
    is_frame = np.ones((SIDE, SIDE), bool)
    is_frame[2:-2, 2:-2] = False
    return np.median(pixels[is_frame], axis=0)


def _nearest(colour: np.ndarray, named: dict[str, tuple[int, int, int]]) -> str | None:
    distances = np.linalg.norm(np.array(list(named.values())) - colour, axis=1)
    if distances.min() > MAX_COLOUR_DISTANCE:
        return None
    return list(named)[int(distances.argmin())]


def _foreground(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Return where the image is nearer to the shape at hand than to the background. bool.

    The half is that of the greatest contrast within 3 pixels, so a pale shape is kept next to a
    strong one.
    """
    contrast = np.linalg.norm(pixels - ground, axis=2)
    return (contrast > MIN_CONTRAST) & (contrast >= 0.5 * _largest_near(contrast, 7))


def _largest_near(values: np.ndarray, width_px: int) -> np.ndarray:
    """Return the maximum in a square window, as uint8 steps of 2. values: (SIDE, SIDE) in 0..510"""
    halves = Image.fromarray((values / 2).astype(np.uint8))
    return 2.0 * np.asarray(halves.filter(ImageFilter.MaxFilter(width_px)), np.float32)


def _pieces(is_shape: np.ndarray) -> list[np.ndarray]:
    """Return the connected pieces (8 neighbours) as bool masks, largest first, without specks."""
    labels = np.where(is_shape, np.arange(1, is_shape.size + 1).reshape(is_shape.shape), 0)
    while True:
        rows = np.pad(labels, ((1, 1), (0, 0)))
        tall = np.maximum(np.maximum(rows[:-2], rows[2:]), labels)
        columns = np.pad(tall, ((0, 0), (1, 1)))
        grown = np.maximum(np.maximum(columns[:, :-2], columns[:, 2:]), tall) * is_shape
        if (grown == labels).all():
            break
        labels = grown
    names, areas = np.unique(labels[is_shape], return_counts=True)
    order = np.argsort(-areas, kind="stable")
    floor = max(MIN_AREA, MIN_AREA_RATIO * areas.max(initial=0))
    return [labels == names[i] for i in order if areas[i] >= floor]


def _shapes(pixels: np.ndarray, ground: np.ndarray) -> list[_Shape]:
    """Read all shapes in front of the background, largest first."""
    pieces = _pieces(_foreground(pixels, ground))
    shapes = [_shape(pixels, ground, piece) for piece in pieces]
    if len(shapes) > 1 and not any(shape.kind for shape in shapes):  # perhaps one, torn
        whole = _shape(pixels, ground, np.any(pieces, axis=0))
        shapes = [whole] if whole.kind else shapes
    return shapes


def _in_order(shapes: list[_Shape]) -> list[_Shape]:
    """Return two shapes with the left or upper one first; other numbers of them as they are."""
    if len(shapes) != 2:
        return shapes
    if _is_beside(*shapes):
        return sorted(shapes, key=lambda shape: shape.x)
    return sorted(shapes, key=lambda shape: shape.y)


def _is_beside(first: _Shape, second: _Shape) -> bool:
    return abs(first.x - second.x) > abs(first.y - second.y)


def _shape(pixels: np.ndarray, ground: np.ndarray, piece: np.ndarray) -> _Shape:
    """Read one shape from the pixels in and around a piece of the foreground."""
    mask, colour = _soft_mask(pixels, ground, piece)
    normalised, area, (x, y) = _normalise(mask)
    templates, areas = _outlines()
    shared = np.minimum(templates, normalised).sum(axis=(-2, -1))
    ious = shared / (templates.sum(axis=(-2, -1)) + normalised.sum() - shared)
    iou_of_kind = ious.reshape(len(KINDS), -1).max(axis=1)
    *_, second, best = np.argsort(iou_of_kind)
    lead = iou_of_kind[best] - iou_of_kind[second]
    is_named = iou_of_kind[best] >= MIN_IOU and lead >= MIN_LEAD
    ratios = np.sqrt(area / areas[best])  # radius over each known one
    nearest = int(np.abs(np.log(ratios)).argmin())
    return _Shape(
        kind=KINDS[best] if is_named else None,
        colour=_nearest(colour, COLOURS),
        radius=float(ratios[nearest]) * RADII[nearest],
        x=x,
        y=y,
    )


def _size(shape: _Shape, sizes: Mapping[str, float]) -> str | None:
    """Return the name of the size nearest to a shape's radius, None where none is near."""
    distances = {name: abs(np.log(shape.radius / radius)) for name, radius in sizes.items()}
    name = min(distances, key=lambda one: distances[one])
    return name if distances[name] <= np.log(MAX_RADIUS_RATIO) else None


def _soft_mask(
    pixels: np.ndarray, ground: np.ndarray, piece: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a piece as a mask in [0, 1], and its colour (3,).

    The mask is how far each pixel in and around the piece lies on the way from the background to
    the colour, which is the median of the half of the piece that stands out most.
    """
    contrast = np.linalg.norm(pixels - ground, axis=2)
    colour = np.median(pixels[piece & (contrast >= np.median(contrast[piece]))], axis=0)
    way = colour - ground
    mask = np.clip((pixels - ground) @ way / (way @ way), 0, 1)
    return mask * (_largest_near(255.0 * piece, 5) > 0), colour


def _normalise(mask: np.ndarray) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Return the mask (MASK_PX, MASK_PX) at unit area and centred; its area and centroid, px."""
    area = float(mask.sum())
    positions = np.arange(SIDE) + 0.5
    x, y = float(mask.sum(axis=0) @ positions) / area, float(mask.sum(axis=1) @ positions) / area
    reach = REACH * area**0.5
    margin = 2 * SIDE
    padded = Image.fromarray(np.pad(mask.astype(np.float32), margin))
    box = (x - reach + margin, y - reach + margin, x + reach + margin, y + reach + margin)
    normal = padded.resize((MASK_PX, MASK_PX), Image.Resampling.BILINEAR, box=box)
    return np.asarray(normal), area, (x, y)


@cache
def _outlines() -> tuple[np.ndarray, np.ndarray]:
    """Return normalised masks (kinds, variants, MASK_PX, MASK_PX) and mean areas (kinds, radii).

    Rendered images give them by the same steps as any image gives its mask; the mean over
    positions and radii is the outline of a size and softness.
    """
    rng = np.random.default_rng(0)
    masks = np.zeros((len(KINDS), len(RADII), len(SOFTNESS_PX), MASK_PX, MASK_PX))
    areas = np.zeros((len(KINDS), len(RADII)))
    num_renderings = 16
    for k, kind in enumerate(KINDS):
        for s, radius in enumerate(RADII):
            for _ in range(num_renderings):
                scene = Scene(kind, "blue", "known", "white")
                image = render(scene, rng, size_px=SIDE, sizes={"known": radius})
                for b, softness in enumerate(SOFTNESS_PX):
                    pixels = _pixels(image.filter(ImageFilter.GaussianBlur(softness)))
                    ground = _ground(pixels)
                    [piece] = _pieces(_foreground(pixels, ground))
                    mask, area, _ = _normalise(_soft_mask(pixels, ground, piece)[0])
                    masks[k, s, b] += mask / num_renderings
                    areas[k, s] += area / (num_renderings * len(SOFTNESS_PX))
    return masks.reshape(len(KINDS), -1, MASK_PX, MASK_PX).astype(np.float32), areas
