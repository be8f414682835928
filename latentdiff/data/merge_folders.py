"""Several captioned folders as one: OUT/{train,validation,test}, each with one metadata.jsonl.

An image becomes SPLIT/FOLDER/NAME, by a hard link where the file system has them and by a copy
elsewhere, so that its id names its source. `captions` holds all captions of an image as a list,
also where a folder has one caption an image. A folder of train/ (and validation/, test/) that each
hold a metadata.jsonl keeps every column of its rows; any other captioned folder is read as for
training: sidecar files, other tables, shards, parquet. There, images without a caption are skipped.
"""

import io
import json
import logging
import os
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from latentdiff.atomic import atomic_folder
from latentdiff.data.arrow.listing import is_table_row
from latentdiff.data.folder.files import existing_path
from latentdiff.data.folder.folder import Folder, Record, read_folder
from latentdiff.data.folder.folder_names import FOLDER_NAMES, SPLITS
from latentdiff.data.folder.metadata import decoded_lines, to_texts
from latentdiff.image_io import EXTENSIONS, read_header

logger = logging.getLogger(__name__)
TABLE = "metadata.jsonl"
MAX_INVALID_FRACTION = 0.02  # of a folder's images, as in training


def merge_folders(out: str | Path, folders: Sequence[str | Path]) -> dict[str, dict[str, int]]:
    """Write `out` from captioned folders.

    Returns the number of images by folder and split. `out` appears whole or not at all. Raises
    FileExistsError where there is something already, FileNotFoundError for a folder or an image
    that is not there, ValueError for a folder or row that cannot be used or two folders of one
    name.
    """
    out, roots = Path(out), [existing_path(Path(folder)).resolve() for folder in folders]
    if out.exists():
        raise FileExistsError(f"{out} exists already, expected the name of a new folder")
    names = [unicodedata.normalize("NFC", root.name) for root in roots]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected folders of different names, got {', '.join(names) or 'none'}")
    counts: dict[str, dict[str, int]] = {}
    with atomic_folder(out) as temporary:
        for root in roots:
            add = _add_tables if _has_tables_only(root) else _add_folder
            counts[root.name] = add(root, temporary)
    return counts


def _has_tables_only(root: Path) -> bool:
    """Return whether a folder has folders of splits that each hold a metadata.jsonl."""
    folders = [path for path in root.glob("*") if path.name.lower() in FOLDER_NAMES]
    has_table = [(path / TABLE).is_file() for path in folders if path.is_dir()]
    is_known = all(path.name in SPLITS for path in folders)
    return any(has_table) and all(has_table) and is_known


def _add_tables(root: Path, out: Path) -> dict[str, int]:
    splits = [split for split in SPLITS if (root / split / TABLE).is_file()]
    return {split: _add(root, split, out / split) for split in splits}


def _add_folder(root: Path, out: Path) -> dict[str, int]:
    """Add a folder's records to `out`; return how many by split. Raises ValueError for faults."""
    folder = read_folder(root)
    folder.check(max_invalid_fraction=MAX_INVALID_FRACTION)
    for group in folder.problems.groups("skipped"):
        logger.warning("%s: %s", root.name, group.line())
    counts: dict[str, int] = {}
    for index, record in enumerate(folder):
        name = f"{root.name}/{_name_in_split(record, folder, index)}"
        target = out / record.split / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if record.path.is_file():
            _link(record.path, target)
        else:
            target.write_bytes(folder.read_bytes(index))
        captions = list(record.captions)
        row = {"file_name": name, "text": captions[0], "captions": captions}
        _append(out / record.split / TABLE, row)
        counts[record.split] = counts.get(record.split, 0) + 1
    return counts


def _name_in_split(record: Record, folder: Folder, index: int) -> str:
    """Name an image below its split: its id without the split's folder, with an extension."""
    top, _, rest = record.id.partition("/")
    name = rest if rest and top.lower() in FOLDER_NAMES else record.id
    if is_table_row(record.id):
        header = read_header(io.BytesIO(folder.read_bytes(index)))
        name += EXTENSIONS[header.format][0]
    return name


def _append(table: Path, row: dict[str, Any]) -> None:
    with table.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _add(root: Path, split: str, out: Path) -> int:
    """Add a folder's images and rows of one split to `out`; return how many."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for row in _rows(root / split / TABLE):
        source = existing_path(root / split / row["file_name"])
        name = f"{root.name}/{source.relative_to(root / split)}"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        _link(source, out / name)
        _append(out / TABLE, row | {"file_name": name})
        count += 1
    (out / TABLE).touch()
    return count


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, each with `text` and `captions`."""
    with table.open("rb") as file:
        for number, line in enumerate(decoded_lines(file), start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            name = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(name, str) or not _is_below(name):
                raise ValueError(f"{table}:{number} names no image below its folder: {name!r}")
            captions = to_texts(row.get("captions", row.get("text")))
            if captions is None:
                raise ValueError(f'{table}:{number} has no caption in "text" or "captions"')
            yield {"file_name": name, "text": captions[0]} | row | {"captions": captions}


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _link(source: Path, target: Path) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist, and {source.parent / TABLE} names it")
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise ValueError(f"{source.parent / TABLE} names {source.name} twice") from None
    except OSError:
        shutil.copy2(source, target)
