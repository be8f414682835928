"""PNG files with settings: valid ones as written and rewritten, damaged and hostile ones."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from fuzz_inputs import FuzzCase
from PIL import Image, PngImagePlugin

from latentdiff.pipeline.png_metadata import (
    KEY,
    attach_settings,
    read_image_settings,
    read_settings,
)

NAME = "image.png"
TEXTS = ("a cat", "Ünïcode ♥ 漢字 🎈", "", "<script>", "a clock (12:30)", "\0\x1b[2J", "x" * 3000)
KINDS_OF_CHUNK = ("tEXt", "zTXt", "iTXt", "iTXt compressed")


def make_case(generator: random.Random) -> FuzzCase:
    """Return one PNG file: half of them valid."""
    makers = (_written, _rewritten, _hostile_json, _damaged_file)
    return generator.choice(makers)(generator)


def _settings(generator: random.Random) -> dict[str, Any]:
    call = {
        "prompt": generator.choice(TEXTS),
        "negative_prompt": generator.choice(TEXTS),
        "seed": generator.randrange(2**63),
        "guidance_scale": generator.random() * 10,
        "guidance_interval": [0.0, generator.random()],
    }
    kept = generator.sample(sorted(call.items()), generator.randrange(len(call) + 1))
    return {"call": dict(kept), "model": {"name": None, "fingerprint": "0" * 16}}


def _written(generator: random.Random) -> FuzzCase:
    """One image or a sheet, as our writer writes it."""
    settings: Any = _settings(generator)
    if generator.random() < 0.3:
        settings = [_settings(generator) for _ in range(generator.randrange(4))]
    mode = generator.choice(("RGB", "L", "RGBA", "P", "1"))

    def load(folder: Path) -> Any:
        attach_settings(Image.new(mode, (4, 4)), settings).save(folder / NAME)
        return read_settings(folder / NAME)

    return FuzzCase(f"written {settings!r:.80}", load, partial(_equal, settings))


def _rewritten(generator: random.Random) -> FuzzCase:
    """The same text in any kind of chunk, before or after the pixels, in any JSON layout."""
    settings = _settings(generator)
    kind = generator.choice(KINDS_OF_CHUNK)
    is_ascii = kind in ("tEXt", "zTXt") or generator.random() < 0.5
    text = json.dumps(settings, ensure_ascii=is_ascii, indent=generator.choice((None, 2)))
    content = _png(_chunk(kind, text.encode()), is_last=generator.random() < 0.5)
    return FuzzCase(f"{kind} {text[:80]!r}", _read(content), partial(_equal, settings))


def _hostile_json(generator: random.Random) -> FuzzCase:
    text = generator.choice(
        (
            "",
            "{",
            "null",
            "3",
            "true",
            '"text"',
            "[1, 2]",
            '[{"call": {}}, null]',
            '{"call": {"seed": NaN}}',
            '{"call": {"guidance_scale": Infinity}}',
            '{"call": {"seed": 1, "seed": 2}}',
            '{"call": {}, "call": {}}',
            '{"call": {"prompt": "\\ud83d"}}',
            '{"call": {"seed": ' + "9" * 5000 + "}}",
            "[" * 100_000,
            '{"call": ' + '{"a": ' * 50_000,
            "\ufeff{}",
            "{'call': {}}",
            '{"call": {}} trailing',
        )
    )
    kind = generator.choice(KINDS_OF_CHUNK[2:])
    return FuzzCase(
        f"{kind} {text[:80]!r}", _read(_png(_chunk(kind, text.encode()))), named=(NAME,)
    )


def _damaged_file(generator: random.Random) -> FuzzCase:
    """Truncated at any place, other files under the name, settings of a sheet or of no call."""
    good = _png(_chunk("iTXt", json.dumps(_settings(generator)).encode()))
    huge = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    content, load = generator.choice(
        (
            (good[: generator.randrange(len(_plain()) - 16)], read_settings),
            (_plain(), read_settings),
            (generator.randbytes(100), read_settings),
            (b"GIF89a" + generator.randbytes(30), read_settings),
            (b"\xff\xd8\xff" + generator.randbytes(30), read_settings),
            (_png(_raw(b"iTXt", KEY.encode() + b"\0\1\0\0\0broken")), read_settings),
            (
                _png(_raw(b"zTXt", KEY.encode() + b"\0\0" + zlib.compress(bytes(10**8)))),
                read_settings,
            )
            if generator.random() < 0.1
            else (b"", read_settings),
            (_png(_raw(b"tEXt", b"latentdifg\0{}")), read_settings),
            (good[:8] + _raw(b"IHDR", huge) + good[33:], read_settings),
            (_png(_chunk("iTXt", b'[{"call": {}}, {"call": {}}]')), read_image_settings),
            (_png(_chunk("iTXt", b'{"call": [1]}')), read_image_settings),
            (_png(_chunk("iTXt", b'{"model": {}}')), read_image_settings),
            (_png(_chunk("iTXt", b"{}")), read_image_settings),
        )
    )
    return FuzzCase(f"{load.__name__} {content[:60]!r}", _read(content, load), named=(NAME,))


def _chunk(kind: str, text: bytes) -> bytes:
    key = KEY.encode()
    if kind == "tEXt":
        return _raw(b"tEXt", key + b"\0" + text)
    if kind == "zTXt":
        return _raw(b"zTXt", key + b"\0\0" + zlib.compress(text))
    is_compressed = kind != "iTXt"
    body = zlib.compress(text) if is_compressed else text
    return _raw(b"iTXt", key + b"\0" + bytes([is_compressed]) + b"\0\0\0" + body)


def _raw(name: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + check


@cache
def _plain() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format="PNG", pnginfo=PngImagePlugin.PngInfo())
    return stream.getvalue()


def _png(chunk: bytes, *, is_last: bool = False) -> bytes:
    """Put a chunk after the header, or after the pixels before the end chunk of 12 bytes."""
    place = len(_plain()) - 12 if is_last else 33
    return _plain()[:place] + chunk + _plain()[place:]


def _read(content: bytes, read: Callable[[Path], Any] = read_settings) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        (folder / NAME).write_bytes(content)
        return read(folder / NAME)

    return load


def _equal(expected: object, found: object) -> bool:
    return found == expected
