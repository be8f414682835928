"""Images of three shapes, so that there are three aspect-ratio buckets with uneven counts."""

from pathlib import Path

from fakes_data import save_image, write_jsonl

SIZES = {"wide": (60, 36), "tall": (36, 64), "square": (40, 40)}  # (width, height)
COUNTS = {"wide": 6, "tall": 3, "square": 2}


def write_three_shapes(folder: Path, *, comma: str = ",") -> Path:
    """Write train/ (six wide, three tall, two square images) and test/ (one of each)."""
    number = 0
    for split, counts in (("train", COUNTS), ("test", dict.fromkeys(COUNTS, 1))):
        rows = []
        for kind, count in counts.items():
            width, height = SIZES[kind]
            for _ in range(count):
                name = f"{number:02d}.png"
                save_image(folder / split / name, number, width=width, height=height)
                text = f"{kind}{comma} image{comma} number {number}"
                rows.append({"file_name": name, "text": text})
                number += 1
        write_jsonl(folder / split / "metadata.jsonl", rows)
    return folder
