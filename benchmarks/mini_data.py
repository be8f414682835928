"""The training data of latentdiff-mini: seven captioned folders as one, several captions each.

    python benchmarks/mini_data.py DATA --out DIR/mini

DATA holds emoji-styles, noto-emoji, stamps, clipart and flowers, each with train/ and test/ (of
emoji-styles: test_combo/, whose subjects and styles are trained on, never together). To them come
the shapes world and composite scenes made from the emoji (`latentdiff.data.composites`). Every
image of one subject also gets its plain caption, "a cat" beside "a cat, blob style", and each noto
emoji those that name its style. Drawing is deterministic; images are hard links where possible.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentdiff.data.composites import write_composites
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
NUM_COMPOSITES = 6000
NUM_SHAPES = 1500


def captions(row: dict[str, Any], source: str) -> list[str]:
    """Return all captions of an image, the plain one among them, each once."""
    subject = row.get("subject")
    found = [row["text"], *row.get("captions", [])]
    if source == "noto-emoji":
        text = row["text"]
        found += [f"{text}, noto style", f"a noto emoji of {text}", f"{text} in noto style"]
    if subject:
        found.append(subject)
    return list(dict.fromkeys(found))


def rows(data: Path, source: str, split: str) -> Iterator[dict[str, Any]]:
    """Yield a split's rows with all captions in `captions`."""
    table = data / source / SPLITS[source][split] / "metadata.jsonl"
    for line in table.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row | {"captions": captions(row, source)}


def stage(data: Path, out: Path, source: str) -> Path:
    """Write out/SOURCE/{train,test} of links with the rows above; return out/SOURCE."""
    for split, folder in SPLITS[source].items():
        (out / source / split).mkdir(parents=True)
        with (out / source / split / "metadata.jsonl").open("w", encoding="utf-8") as lines:
            for row in rows(data, source, split):
                name = row["file_name"]
                (out / source / split / name).symlink_to((data / source / folder / name).resolve())
                lines.write(json.dumps(row) + "\n")
    return out / source


def main() -> None:
    """Write the folder and print its number of images by source."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="folder that holds the five data sets")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--num_composites", type=int, default=NUM_COMPOSITES)
    parser.add_argument("--num_shapes", type=int, default=NUM_SHAPES)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as temporary:
        staged = [stage(args.data, Path(temporary), source) for source in SPLITS]
        drawings = [args.data / source / "train" for source in ("emoji-styles", "noto-emoji")]
        composites = Path(temporary) / "composites"
        write_composites(composites, drawings, num_images=args.num_composites, size_px=SIZE_PX)
        shapes = Path(temporary) / "shapes"
        write_shapes(shapes, num_train=args.num_shapes, size_px=SIZE_PX, pair_fraction=0.5)
        for name, count in merge_folders(args.out, [*staged, composites, shapes]).items():
            print(name, count)


if __name__ == "__main__":
    main()
