"""Several captioned folders as one: OUT/{train,validation,test}, each with one metadata.jsonl.

An image becomes SPLIT/FOLDER/NAME, by a hard link where the file system has them and by a copy
elsewhere, so that its id names its source. Its row keeps every column; `captions` holds all
its captions as a list, also where a folder has one caption an image. Folders with sidecar files,
tables of another kind or shards are not merged.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from latentdiff.atomic import atomic_folder
from latentdiff.data.folder.metadata import decoded_lines, to_texts
from latentdiff.data.folder.splits import SPLITS

TABLE = "metadata.jsonl"


def merge_folders(out: str | Path, folders: Sequence[str | Path]) -> dict[str, dict[str, int]]:
    """Write `out` from folders that hold train/ (and validation/, test/) with a metadata.jsonl.

    Returns the number of images by folder and split. `out` appears whole or not at all. Raises
    FileExistsError where there is something already, FileNotFoundError for a folder or an image
    that is not there, ValueError for a row that cannot be used or two folders of one name.
    """
    out, roots = Path(out), [Path(folder).resolve() for folder in folders]
    if out.exists():
        raise FileExistsError(f"{out} exists already, expected the name of a new folder")
    names = [root.name for root in roots]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected folders of different names, got {', '.join(names) or 'none'}")
    counts: dict[str, dict[str, int]] = {}
    with atomic_folder(out) as temporary:
        for root in roots:
            splits = [split for split in SPLITS if (root / split / TABLE).is_file()]
            if not splits:
                raise FileNotFoundError(
                    f"{root} has no train/{TABLE}, expected a folder with train/ (and validation/ "
                    f"or test/) that each hold a {TABLE}"
                )
            counts[root.name] = {split: _add(root, split, temporary / split) for split in splits}
    return counts


def _add(root: Path, split: str, out: Path) -> int:
    """Add a folder's images and rows of one split to `out`; return how many."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    with (out / TABLE).open("a", encoding="utf-8") as lines:
        for row in _rows(root / split / TABLE):
            source, name = root / split / row["file_name"], f"{root.name}/{row['file_name']}"
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            _link(source, out / name)
            lines.write(json.dumps(row | {"file_name": name}, ensure_ascii=False) + "\n")
            count += 1
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
