"""The images of this session, newest first, as PNG files in a folder that ends with it."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.app.image_request import ImageRequest
from latentdiff.pipeline.png_metadata import save_png

MAX_ENTRIES = 200


@dataclass(frozen=True)
class HistoryEntry:
    """An image, the request that makes it again, and the settings in its file."""

    path: Path
    size: tuple[int, int]  # (width, height)
    request: ImageRequest
    settings: Mapping[str, Any]


class History:
    """The newest images, MAX_ENTRIES at most; older files are deleted."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="latentdiff-app-")
        self.folder = Path(self._scratch.name).resolve()
        self._entries: list[HistoryEntry] = []
        self._num_made = 0
        self._lock = threading.Lock()

    def add(
        self, image: Image.Image, request: ImageRequest, *, seed: int, settings: Mapping[str, Any]
    ) -> HistoryEntry:
        """Write an image's file and put it first."""
        again = replace(request, seed=str(seed), num_images_per_prompt=1)
        with self._lock:
            self._num_made += 1
            path = save_png(image, self.folder / f"{self._num_made:05d}-seed-{seed}.png")
            entry = HistoryEntry(path, image.size, again, settings)
            self._entries.insert(0, entry)
            for old in self._entries[MAX_ENTRIES:]:
                old.path.unlink(missing_ok=True)
            del self._entries[MAX_ENTRIES:]
        return entry

    def entries(self) -> list[HistoryEntry]:
        """Return the entries, newest first."""
        with self._lock:
            return list(self._entries)

    def find(self, name: str) -> HistoryEntry | None:
        """Return the entry with a file name, None for one that is not there any more."""
        return next((one for one in self.entries() if one.path.name == name), None)
