"""The training data of latentdiff-mini: seven captioned folders as one, several captions each.

    python benchmarks/mini_data.py DATA --out DIR

DATA holds emoji-styles, noto-emoji, stamps, clipart and flowers, each with train/ and test/ (of
emoji-styles: test_combo/, whose subjects and styles are trained on, never together), and nouns.tsv,
a list of everyday nouns. Three folders are written, which `data.sources` weights:

- DIR/all: every image, with the shapes world;
- DIR/nouns: the images whose subject is an everyday noun, or a kind of it ("a dog face" is a dog),
  the noun among their captions;
- DIR/scenes: scenes of those, counted, recoloured, in a relation (`latentdiff.data.composites`).

An image of one subject also gets its plain caption, "a cat" beside "a cat, blob style"; an image
without colour never does, so that "a cat" is in colour. Drawing is deterministic; images are
hard links where possible.
"""

import argparse
import csv
import json
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from latentdiff.data.composites import COLOURS, with_article, write_composites
from latentdiff.data.merge_folders import merge_folders
from latentdiff.data.shapes import write_shapes

SPLITS = {  # the folder of each split, by data set
    "emoji-styles": {"train": "train", "test": "test_combo"},
    "noto-emoji": {"train": "train"},  # its test subjects are in no other split either
    "stamps": {"train": "train", "test": "test"},
    "clipart": {"train": "train", "test": "test"},
    "flowers": {"train": "train", "test": "test"},
}
SIZE_PX = 128
NUM_SCENES = 8000
NUM_SHAPES = 1500
OTHER_THINGS = {  # phrases that end like a noun and are something else
    *("hot dog", "corn dog", "moon cake", "rice ball", "confetti ball", "railway car"),
    *("sand castle", "light heart", "anatomical heart", "shooting star", "dizzy star"),
}
KINDS = {  # nouns whose name says nothing of their kind, and phrases of more words
    "flower": ("rose", "tulip", "sunflower", "hibiscus", "blossom", "cherry blossom", "daisy"),
    "face": ("slightly smiling face",),
    "computer": ("laptop",),
    "glasses": ("pair of glasses",),
    "cup": ("cup of coffee", "teacup"),
    "boat": ("sailboat", "speedboat", "canoe"),
    "shoe": ("high-heeled shoe", "hiking boot"),
}


def captions(row: dict[str, Any], source: str) -> list[str]:
    """Return all captions of an image, the plain one among them, each once."""
    subject = row.get("subject")
    found = [row["text"], *row.get("captions", [])]
    if source == "noto-emoji":
        text = row["text"]
        found += [f"{text}, noto style", f"a noto emoji of {text}", f"{text} in noto style"]
    if subject and not is_colourless(row):
        found.append(subject)
    return list(dict.fromkeys(found))


def is_colourless(row: dict[str, Any]) -> bool:
    """Return whether an image is without colour, so that all its captions name the style."""
    return row.get("style_text") == "black and white style" or bool(row.get("mono"))


def noun_of(row: dict[str, Any], nouns: Collection[str]) -> str | None:
    """Return the everyday noun that an image shows: that it is called by, or a kind of it."""
    subject = row.get("subject") or row["text"]
    words = re.sub(r"^(a|an|the) ", "", subject).split()
    phrase = " ".join(word for word in words if word not in COLOURS)
    if phrase in OTHER_THINGS:
        return None
    for noun, names in KINDS.items():
        if phrase in names:
            return noun
    phrase = phrase.removesuffix(" face") if phrase.removesuffix(" face") in nouns else phrase
    heads = [phrase, *phrase.split(" ", 1)[1:]] if phrase.count(" ") < 3 else []
    return next((head for head in heads if head in nouns), None)


def rows(data: Path, source: str, split: str) -> Iterator[dict[str, Any]]:
    """Yield a split's rows with all captions in `captions`."""
    table = data / source / SPLITS[source][split] / "metadata.jsonl"
    for line in table.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row | {"captions": captions(row, source)}


def stage(data: Path, out: Path, source: str) -> Path:
    """Write out/SOURCE/{train,test} of links with the rows above; return out/SOURCE."""
    for split, folder in SPLITS[source].items():
        _write(out / source / split, data / source / folder, list(rows(data, source, split)))
    return out / source


def stage_nouns(data: Path, out: Path, nouns: Collection[str]) -> Path:
    """Write out/SOURCE/train of links to the images of everyday nouns; return `out`.

    `subject` is the noun, "a dog"; half of an image's captions are it, without a colour's name.
    """
    for source in SPLITS:
        found = []
        for row in rows(data, source, "train") if source != "flowers" else ():
            noun = noun_of(row, nouns)
            if noun and not is_colourless(row):
                found.append(row | _as_noun(row, noun, source))
        if found:
            _write(out / source / "train", data / source / SPLITS[source]["train"], found)
    return out


def _as_noun(row: dict[str, Any], noun: str, source: str) -> dict[str, Any]:
    """Return the columns that call an image by its everyday noun."""
    plain = with_article(noun)
    texts, style = row["captions"], row.get("style_text", "")
    if source in ("emoji-styles", "noto-emoji"):
        style = style or "noto style"
        texts = [f"{plain}, {style}", *texts]
    return {"captions": texts + [plain] * len(texts), "subject": plain, "style_text": style}


def _write(out: Path, images: Path, found: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True)
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for row in found:
            (out / row["file_name"]).symlink_to((images / row["file_name"]).resolve())
            lines.write(json.dumps(row) + "\n")


def main() -> None:
    """Write the folders and print their numbers of images by source."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder that holds the five data sets")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--num_scenes", type=int, default=NUM_SCENES)
    parser.add_argument("--num_shapes", type=int, default=NUM_SHAPES)
    args = parser.parse_args()
    with (args.data / "nouns.tsv").open(encoding="utf-8") as table:
        nouns = {row["noun"] for row in csv.DictReader(table, delimiter="\t")} | {"face"}
    args.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=args.out) as temporary:
        staged = [stage(args.data, Path(temporary) / "all", source) for source in SPLITS]
        shapes = Path(temporary) / "shapes"
        write_shapes(shapes, num_train=args.num_shapes, size_px=SIZE_PX, pair_fraction=0.5)
        everyday = sorted(stage_nouns(args.data, Path(temporary) / "nouns", nouns).iterdir())
        scenes = Path(temporary) / "scenes"
        drawings = [folder / "train" for folder in everyday]
        write_composites(scenes, drawings, num_images=args.num_scenes, size_px=SIZE_PX)
        parts = {"all": [*staged, shapes], "nouns": everyday, "scenes": [scenes]}
        for part, folders in parts.items():
            for name, count in merge_folders(args.out / part, folders).items():
                print(part, name, count)


if __name__ == "__main__":
    main()
