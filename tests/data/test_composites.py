"""Composite scenes: each image shows what its caption says, from drawings alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from latentdiff.data.composites import (
    HUES,
    plural,
    read_drawings,
    recolour,
    with_article,
    write_composites,
)
from latentdiff.data.folder.folder import read_folder

INK = {"cat": (220, 40, 40), "apple": (40, 60, 220), "tree": (30, 150, 50)}


def drawings(root: Path) -> Path:
    """Three discs of different colours on white, called a cat, a red apple and a tree."""
    (root / "train").mkdir(parents=True)
    rows = []
    for noun, ink in INK.items():
        image = Image.new("RGB", (64, 64), (255, 255, 255))
        ImageDraw.Draw(image).ellipse((8, 8, 55, 55), fill=ink)
        image.save(root / "train" / f"{noun}.png")
        subject = "a red apple" if noun == "apple" else f"a {noun}"
        rows.append({"file_name": f"{noun}.png", "text": subject, "style_text": "flat style"})
    rows.append({"file_name": "cat.png", "text": "a flag of a country that rains"})
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "train"


def pieces(image: Image.Image) -> list[tuple[float, float, float]]:
    """Return (x, y, hue in degrees) of each connected drawing."""
    pixels = np.asarray(image.convert("RGB"))
    labels, count = ndimage.label((pixels < 200).any(axis=2))
    hues = np.asarray(image.convert("HSV"), float)[..., 0] * 360 / 255
    found = []
    for k in range(1, count + 1):
        rows, columns = np.nonzero(labels == k)
        if len(rows) > 30:
            found.append((columns.mean(), rows.mean(), float(np.median(hues[labels == k]))))
    return found


def test_a_subject_is_one_thing_without_article_or_colour(tmp_path: Path) -> None:
    found = read_drawings(drawings(tmp_path))
    assert [one.noun for one in found] == ["cat", "apple", "tree"]
    assert {one.style for one in found} == {"flat style"}
    assert found[0].cut_out().size == (48, 48)


@pytest.fixture(scope="module")
def composites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("composites")
    return write_composites(root / "out", [drawings(root / "in")], num_images=90, size_px=96)


def hue_of(words: str) -> float:
    """Return the hue that a phrase names by its colour, or by its noun, as drawn above."""
    for colour, (hue, *_) in HUES.items():
        if colour in words.split():
            return hue
    [ink] = [ink for noun, ink in INK.items() if noun in words]
    return float(np.asarray(Image.new("RGB", (1, 1), ink).convert("HSV"))[0, 0, 0]) * 360 / 255


def is_near(hue: float, other: float) -> bool:
    return abs((hue - other + 180) % 360 - 180) < 12


def test_each_composite_shows_the_count_colours_and_relation_of_its_caption(
    composites: Path,
) -> None:
    lines = (composites / "train" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kinds = {"count": 0, "relation": 0, "colour": 0}
    for row in rows:
        caption = row["text"]
        found = pieces(Image.open(composites / "train" / row["file_name"]))
        assert row["captions"][0] == caption
        relation = next(
            (r for r in ("left of", "right of", "above", "below", "next to") if r in caption), None
        )
        if caption.startswith(("two", "three")):
            kinds["count"] += 1
            assert len(found) == {"two": 2, "three": 3}[caption.split()[0]]
        elif relation:
            kinds["relation"] += 1
            first, second = caption.split(f" {relation} ")
            assert len(found) == 2
            if is_near(hue_of(first), hue_of(second)):
                continue
            [a] = [one for one in found if is_near(one[2], hue_of(first))]
            [b] = [one for one in found if is_near(one[2], hue_of(second))]
            lies = {
                "left of": a[0] < b[0] - 20,
                "right of": a[0] > b[0] + 20,
                "above": a[1] < b[1] - 20,
                "below": a[1] > b[1] + 20,
                "next to": abs(a[0] - b[0]) > 20,
            }
            assert lies[relation], caption
        elif " and " not in caption:
            kinds["colour"] += 1
            [one] = found
            assert is_near(one[2], hue_of(caption)), caption
    assert min(kinds.values()) > 15


def test_composites_depend_on_the_seed_and_the_index_alone(
    composites: Path, tmp_path: Path
) -> None:
    again = write_composites(
        tmp_path / "out", [drawings(tmp_path / "in")], num_images=12, size_px=96
    )
    for i in range(12):
        name = f"train/{i:05d}.png"
        assert (again / name).read_bytes() == (composites / name).read_bytes()
    assert len(list(read_folder(again))) == 12


def test_black_drawings_have_no_hue_to_turn() -> None:
    image = Image.new("RGB", (16, 16), (10, 10, 10))
    assert recolour(image, "red") is None
    turned = recolour(Image.new("RGB", (16, 16), (230, 30, 30)), "blue")
    assert turned is not None
    assert is_near(np.asarray(turned.convert("HSV"), float)[0, 0, 0] * 360 / 255, HUES["blue"][0])


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("cat", "cats"),
        ("box", "boxes"),
        ("cherry", "cherries"),
        ("cherries", "cherries"),
        ("monkey", "monkeys"),
        ("mouse", "mice"),
        ("computer mouse", "computer mice"),
        ("fish", "fish"),
        ("dress", "dresses"),
        ("tomato", "tomatoes"),
        ("bus", "buses"),
        ("cactus", "cactuses"),
        ("glasses", "glasses"),
    ],
)
def test_plurals(noun: str, many: str) -> None:
    assert plural(noun) == many


def test_a_folder_without_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "abstract art 7"}')
    with pytest.raises(ValueError, match=r"no row of .* has a subject such as 'a cat'"):
        write_composites(tmp_path / "out", [tmp_path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("noun", "named"),
    [
        ("cat", "a cat"),
        ("apple", "an apple"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("orange umbrella", "an orange umbrella"),
        ("cactus", "a cactus"),
        ("grapes", "grapes"),
        ("red scissors", "red scissors"),
    ],
)
def test_articles(noun: str, named: str) -> None:
    assert with_article(noun) == named


def test_drawings_without_a_hue_are_refused_rather_than_sought_for_ever(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (10, 10, 10)).save(tmp_path / "crow.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "crow.png", "text": "a crow"}')
    with pytest.raises(ValueError, match="no drawing has one dominant colour"):
        write_composites(tmp_path / "out", [tmp_path], num_images=1)
