"""Images and captioned folders for tests, small and different from one another."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise_image(
    seed: int = 0, *, width: int = 40, height: int = 32, mode: str = "RGB"
) -> Image.Image:
    """A smooth random image, (height, width)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def save_image(path: Path, seed: int = 0, **kwargs: Any) -> Path:
    """Write an image in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_image(seed, **kwargs).save(path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def captioned_folder(root: Path, num: int = 5, **kwargs: Any) -> Path:
    """A good folder: num images 0.png, 1.png, ... and a metadata.jsonl with "image 0", ..."""
    rows = []
    for i in range(num):
        save_image(root / f"{i}.png", i, **kwargs)
        rows.append({"file_name": f"{i}.png", "text": f"image {i}"})
    write_jsonl(root / "metadata.jsonl", rows)
    return root


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
