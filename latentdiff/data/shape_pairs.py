"""Pairs of images of the shapes world: what a model reads as its condition, and what it is to make.

A layout is the shapes alone, in their colors on black, and the caption says the background; an edit
is the image with one shape in another color, and the caption is the instruction; edges are those of
the image. Both images of a pair are drawn from one seed, so that their shapes lie in one place.
Does not answer for: what the shapes are (shapes.py).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from latentdiff.data.edges import draw_edges
from latentdiff.data.shapes import COLOURS, Scene, render, sample_pair, split_scenes

PairKind = Literal["layout", "edit", "edges"]


@dataclass(frozen=True)
class ShapePair:
    """A scene to make, the text that asks for it, and the seed of its place."""

    kind: PairKind
    scene: Scene
    colour_before: str  # of the first shape of an edit
    seed: int

    @property
    def caption(self) -> str:
        """Return the instruction of an edit, the scene's caption otherwise."""
        if self.kind == "edit":
            return f"make the {self.scene.kind} {self.scene.colour}"
        return self.scene.caption

    def image(self, size_px: int) -> Image.Image:
        """Draw the scene: RGB, size_px x size_px."""
        return self._render(self.scene, size_px)

    def condition(self, size_px: int) -> Image.Image:
        """Draw what the model reads: RGB, size_px x size_px."""
        if self.kind == "edges":
            return draw_edges(self.image(size_px))
        is_edit = self.kind == "edit"
        change = {"colour": self.colour_before} if is_edit else {"background": "black"}
        return self._render(replace(self.scene, **change), size_px)

    def _render(self, scene: Scene, size_px: int) -> Image.Image:
        return render(scene, np.random.default_rng(self.seed), size_px=size_px)


def shape_pairs(
    kind: PairKind, num: int, *, is_heldout: bool, pair_fraction: float = 0.5, seed: int = 0
) -> Iterator[ShapePair]:
    """Yield pairs of scenes of one shape and, a share of them, of two.

    is_heldout: of the combinations that `write_shapes` never shows in training. An edit's two
    shapes differ in kind, so that its instruction names one. ValueError for an unknown kind.
    """
    if kind not in get_args(PairKind):
        raise ValueError(f"kind={kind!r}, expected one of: {', '.join(get_args(PairKind))}")
    singles = split_scenes(seed=seed)[int(is_heldout)]
    rng = np.random.default_rng([seed, int(is_heldout), num])
    for index in range(num):
        scene = singles[int(rng.integers(len(singles)))]
        if rng.random() < pair_fraction:
            scene = sample_pair(rng, is_heldout=is_heldout, seed=seed)
            while kind == "edit" and scene.kind == scene.other_kind:
                scene = sample_pair(rng, is_heldout=is_heldout, seed=seed)
        others = [colour for colour in COLOURS if colour != scene.colour]
        before = others[int(rng.integers(len(others)))]
        yield ShapePair(kind, scene, before, seed=int(rng.integers(1 << 31)) + index)


def write_shape_pairs(
    root: str | Path,
    kind: PairKind,
    *,
    num_train: int = 4000,
    num_test: int = 200,
    size_px: int = 128,
    pair_fraction: float = 0.5,
    seed: int = 0,
) -> Path:
    """Write root/{train,test}/ with metadata.jsonl, images and their conditions; return root.

    train shows the seen combinations, test the held-out ones. Raises FileExistsError when root is
    not empty, ValueError for an unknown kind.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; choose a new folder")
    for split, num in (("train", num_train), ("test", num_test)):
        is_heldout = split == "test"
        pairs = shape_pairs(
            kind, num, is_heldout=is_heldout, pair_fraction=pair_fraction, seed=seed
        )
        _write_split(root / split, pairs, size_px=size_px)
    return root


def _write_split(folder: Path, pairs: Iterator[ShapePair], *, size_px: int) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for i, pair in enumerate(pairs):
            name, condition = f"{i:05d}.png", f"{i:05d}.condition.png"
            pair.image(size_px).save(folder / name)
            pair.condition(size_px).save(folder / condition)
            row = {"file_name": name, "text": pair.caption, "condition": condition}
            row |= {k: v for k, v in asdict(pair.scene).items() if v is not None}
            lines.write(json.dumps(row) + "\n")
