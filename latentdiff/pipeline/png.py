"""A picture's settings in its own PNG file: written with the picture, read back later."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from latentdiff.whole_file import whole_file

KEY = "latentdiff"


def attach_settings(image: Image.Image, settings: Any) -> Image.Image:
    """Make `image.save("x.png")` write the settings into the file's text chunks; return the image.

    settings: JSON values. They stay in `image.info` too, so that copies keep them.
    """
    text = json.dumps(settings, ensure_ascii=True)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(KEY, text)
    image.info[KEY] = text
    image.encoderinfo = {"pnginfo": chunks}
    return image


def read_settings(png: str | os.PathLike[str] | Image.Image) -> Any:
    """Return the settings of a picture that LatentDiff made, from its PNG file or as it was made.

    A dict for one picture, a list of them for a sheet. Raises FileNotFoundError, and ValueError
    for a file that is no picture, or one without settings.
    """
    if isinstance(png, Image.Image):
        name, info = "this picture", png.info
    else:
        name = os.fspath(png)
        try:
            with Image.open(png) as image:
                image.load()
                info = dict(image.info)
        except (UnidentifiedImageError, SyntaxError, ValueError, EOFError) as error:
            raise ValueError(f"{name} is not a readable picture: {error}") from error
    if KEY not in info:
        raise ValueError(
            f"{name} holds no settings of LatentDiff; only PNG files as it wrote them do, a copy "
            "in another format or by another program may have lost them"
        )
    try:
        return json.loads(info[KEY])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} holds damaged settings: {error}") from error


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a PNG file atomically, with the picture's settings if it has some; return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")
    return path
