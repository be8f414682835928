"""metrics.jsonl of a run folder, a line of figures at a time: read, added to, and cut at a step.

`latentdiff report` reads it, so PyTorch is not imported here. metrics_log.py makes the figures.
"""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentdiff.atomic import write_text

METRICS = "metrics.jsonl"


def read_rows(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run folder's metrics.jsonl, under today's names; none without it.

    A line that is being written, or that a kill cut short, is left out.
    """
    path = run / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line.replace('"held_out', '"heldout'))  # as earlier versions wrote
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def append_text(path: Path, text: str) -> None:
    """Add text to a file, all of it or none: what a full disk cuts short is taken back."""
    content = text.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(content) < len(content):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines that a run wrote after the checkpoint that it now resumes from."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short
    write_text(path, "".join(f"{line}\n" for line in kept))
