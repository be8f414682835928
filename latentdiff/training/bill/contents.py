"""What an exported folder or file holds, as hashes of its files; the bill is put into it here.

Every file counts, since any may change what a model does, but for what people write or add later:
the card, a licence, sample images, and hidden files. Loads no PyTorch.
"""

import hashlib
import json
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.atomic import atomic_file, write_text
from latentdiff.pipeline.files.model_info import BILL_KEY, BILL_NAME
from latentdiff.training.bill.bill import (
    HEADER,
    WEIGHTS,
    Bill,
    canonical,
    digest,
    from_text,
    to_text,
)

NOT_HASHED = re.compile(  # at the top of a folder
    rf"{re.escape(BILL_NAME)}|readme\.md|licen[cs]e.*|notice.*|.*\.(png|jpe?g|webp)|thumbs\.db"
    r"|desktop\.ini",
    re.IGNORECASE,
)
TEXTS = (".txt", ".md", ".jinja")  # compared without regard to how lines end
PLAIN_ENTRIES = (BILL_KEY, "format")  # of a header, which change nothing of what a file does
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors
CHUNK = 1 << 24  # bytes hashed or copied at a time


def contents(place: Path) -> dict[str, str]:
    """Return hashes of every file of an export, a folder or one file, by its path in it.

    A safetensors file has two: of its tensors, and as NAME#header of its metadata.
    """
    if place.is_file():
        return file_entries(place, place.name)
    found: dict[str, str] = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        parts = path.relative_to(place).parts
        is_hidden = any(part.startswith(".") for part in parts)
        if not is_hidden and not (len(parts) == 1 and NOT_HASHED.fullmatch(path.name)):
            found |= file_entries(path, "/".join(parts))
    return found


def file_entries(path: Path, name: str) -> dict[str, str]:
    """Return the hashes of a file under a name."""
    if path.suffix != WEIGHTS:
        return {name: _file_digest(path)}
    start, header = read_header(path)
    texts = header.pop("__metadata__", {})
    own = {key: text for key, text in texts.items() if key not in PLAIN_ENTRIES}
    return {name: _tensors_digest(path, start, header), name + HEADER: digest(canonical(own))}


def _file_digest(path: Path) -> str:
    """Return the sha256 of a file: of what JSON says, of texts with the line ends of Unix."""
    if path.suffix == ".json":
        try:
            return digest(canonical(json.loads(path.read_bytes(), object_pairs_hook=_unique)))
        except (ValueError, RecursionError):
            pass  # as any other file
    if path.suffix in TEXTS:
        return digest(path.read_bytes().replace(b"\r\n", b"\n"))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors_digest(path: Path, start: int, header: Mapping[str, Any]) -> str:
    """Hash the tensors of a safetensors file: names, types, shapes and bytes, by name."""
    whole = hashlib.sha256()
    for name, facts in sorted(header.items()):
        first, last = facts["data_offsets"]
        whole.update(canonical([name, facts["dtype"], facts["shape"], last - first]))
        if last > first:
            _hash_part(whole, path, start + first, start + last)
    return whole.hexdigest()


def _hash_part(whole: Any, path: Path, first: int, last: int) -> None:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        for at in range(first, last, CHUNK):
            whole.update(content[at : min(at + CHUNK, last)])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a safetensors file begin, and its header."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
        text = file.read(size) if size <= MAX_HEADER else b""
    try:
        header: dict[str, Any] = json.loads(text, object_pairs_hook=_unique)
        ends = [facts["data_offsets"][1] for name, facts in header.items() if name[:2] != "__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}); copy or download it again"
        ) from error
    if (end := 8 + size + max(ends, default=0)) != path.stat().st_size:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, expected {end:,}; copy or download it again"
        )
    return 8 + size, header


def bill_in_header(path: Path) -> tuple[Bill, str] | None:
    """Return the bill in a safetensors file and the root that it states; None without one."""
    text = read_header(path)[1].get("__metadata__", {}).get(BILL_KEY)
    return None if text is None else from_text(text, where=str(path))


def bill_of_folder(folder: Path) -> tuple[Bill, str] | None:
    """Return the bill in a folder's sidecar and the root that it states; None without one."""
    path = folder / BILL_NAME
    return from_text(path.read_text(encoding="utf-8"), where=str(path)) if path.is_file() else None


def attach_to_folder(folder: Path, bill: Bill, *, artifact: str) -> Bill:
    """Put the bill of a folder next to its files, and into the U-Net's, or its first, weights.

    Returns the bill with the hashes of the folder's files.
    """
    own = replace(bill, files=contents(folder), artifact=artifact)
    files = sorted(folder.rglob(f"*{WEIGHTS}"))
    first = [path for path in files if path.parent.name == "unet"] or files
    for path in first[:1]:  # a tokenizer has none
        add_to_header(path, {BILL_KEY: to_text(own, with_images=False)})
    write_text(folder / BILL_NAME, to_text(own, with_images=True))
    return own


def attach_again(folder: Path) -> str:
    """Put the bill of a folder into it again, whose files have changed; return the root, or ""."""
    if (found := bill_of_folder(folder)) is None:
        return ""
    return attach_to_folder(folder, found[0], artifact=found[0].artifact).root


def attach_to_file(path: Path, bill: Bill, *, artifact: str = "") -> Bill:
    """Put the bill of a file of weights, without images, into its header; return it.

    artifact: by default the file's name.
    """
    own = replace(bill, files=contents(path), artifact=artifact or path.name)
    add_to_header(path, {BILL_KEY: to_text(own, with_images=False)})
    return own


def add_to_header(path: Path, entries: Mapping[str, str]) -> None:
    """Add texts to the metadata of a safetensors file; its tensors stay as they are."""
    start, header = read_header(path)
    header["__metadata__"] = {**header.get("__metadata__", {}), **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, path.open("rb") as source, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        source.seek(start)
        while part := source.read(CHUNK):
            file.write(part)
