"""Caption tables of Hugging Face's imagefolder convention: metadata.jsonl, .csv and .parquet.

A table names images by a path relative to its own folder. Rows are yielded as they are read, with
their row or line number; every fault of a table is added to the problems, and reading continues
where it can.
"""

import csv
import difflib
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from latentdiff.data.captions import clean_caption
from latentdiff.data.folder.files import is_utf8
from latentdiff.data.folder.problems import Problems

MAX_WAITING = 10_000  # rows after which a column that none has is missing
COLUMN_HINTS = ("text", "caption", "captions", "prompt", "prompts", "description", "label")


class MetadataRow(NamedTuple):
    """A row of a caption table: its number, the image (below the root) and its captions."""

    number: int
    path: str
    captions: list[str]


def read_metadata(
    root: Path, name: str, *, caption_column: str, file_column: str, problems: Problems
) -> Iterator[MetadataRow]:
    """Yield the good rows of the table `root / name`; `name` is a posix path relative to `root`."""
    reader = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[Path(name).suffix]
    folder = posixpath.dirname(name)
    columns = (file_column, caption_column)
    if not os.access(root / name, os.R_OK):
        problems.add("broken_metadata", name, "cannot be read; check the permissions")
        return
    for number, file_name, caption in reader(root / name, name, columns, problems=problems):
        where = f"{name}:{number}"
        path = path_below(file_name, folder, where=where, problems=problems)
        captions = _captions(
            caption, where, column=caption_column, file_name=str(file_name), problems=problems
        )
        if path is not None and captions is not None:
            yield MetadataRow(number, path, captions)


def read_column(
    root: Path, name: str, *, column: str, file_column: str
) -> Iterator[tuple[int, str, Any]]:
    """Yield (row number, image, value) of another column of a table; nothing where it has none.

    Faults of the table are those that `read_metadata` reports.
    """
    reader = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[Path(name).suffix]
    folder, known = posixpath.dirname(name), Problems()
    if not os.access(root / name, os.R_OK):
        return
    for number, file_name, value in reader(
        root / name, name, (file_column, column), problems=known
    ):
        image = path_below(file_name, folder, where=name, problems=known)
        if image is not None:
            yield number, image, value


def decoded_lines(file: Iterable[bytes]) -> Iterator[str]:
    """Yield a text file's lines, without a byte order mark.

    Raises ValueError with the byte offset where the file is not UTF-8.
    """
    offset = 0
    for raw in file:
        try:
            yield raw.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            at = offset + error.start
            raise ValueError(f"byte {at:,} is 0x{raw[error.start]:02x}") from error
        offset += len(raw)


def to_texts(value: Any) -> list[str] | None:
    """Return a caption value, a text or a list of texts, as a list; None for any other type."""
    texts = value if isinstance(value, list) else [value]
    return texts if texts and all(isinstance(text, str) for text in texts) else None


def no_column(caption_column: str, columns: Sequence[str], *, file_column: str = "") -> str:
    """Describe a missing column: the columns that there are, and the fix."""
    others = [column for column in columns if column != file_column]
    likely = difflib.get_close_matches(caption_column, others, n=1)
    likely += [column for column in COLUMN_HINTS if column in others] + others
    fix = f"--data.caption_column={likely[0]}" if likely else f'add a column "{caption_column}"'
    there = ", ".join(columns) or "none"
    return f'no column "{caption_column}"; the columns are: {there}. Fix: {fix}'


def listed_twice(column: str) -> str:
    """Describe a column that a table has twice, and the fix."""
    return f'the column "{column}" is there twice. Fix: remove or rename one'


def parse_json(text: str, columns: Sequence[str]) -> Any:
    """Parse JSON. Raises ValueError for a text of no JSON, and for one of `columns` given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            if twice := [name for name in columns if names.count(name) > 1]:
                raise ValueError(listed_twice(twice[0]))
        return row

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deep") from error


_Cells = Iterator[tuple[int, Any, Any]]


def _jsonl(path: Path, name: str, columns: tuple[str, str], *, problems: Problems) -> _Cells:
    """Yield rows from when one has both columns, so that a missing column is reported once."""
    seen: dict[str, None] = {}
    waiting: list[tuple[int, Any, Any]] = []
    is_complete = False
    for number, row in _json_objects(path, name, columns, problems=problems):
        cells = (number, row.get(columns[0]), row.get(columns[1]))
        if is_complete:
            yield cells
            continue
        seen.update(dict.fromkeys(row))
        waiting.append(cells)
        is_complete = all(column in seen for column in columns)
        if is_complete:
            yield from waiting
        elif len(waiting) == MAX_WAITING:
            break
    if waiting and not is_complete:
        _missing_column(name, columns, list(seen), problems=problems)


def _json_objects(
    path: Path, name: str, columns: tuple[str, str], *, problems: Problems
) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for number, line in enumerate(_lines_of(path), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, columns)
            except ValueError as error:
                problems.add("broken_metadata", f"{name}:{number}", str(error))
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                detail = f"expected a JSON object, got {type(row).__name__}"
                problems.add("broken_metadata", f"{name}:{number}", detail)
    except ValueError as error:
        problems.add("caption_not_utf8", name, str(error))


def _csv(path: Path, name: str, columns: tuple[str, str], *, problems: Problems) -> _Cells:
    reader = csv.reader(_lines_of(path), strict=True)
    try:
        header = next(reader, [])
        if not _has_columns(name, columns, header, problems=problems):
            return
        at = [header.index(column) for column in columns]
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                detail = f"{len(cells)} cells under {len(header)} column names"
                problems.add("broken_metadata", f"{name}:{reader.line_num}", detail)
                continue
            yield reader.line_num, cells[at[0]], cells[at[1]]
    except csv.Error as error:
        problems.add("broken_metadata", f"{name}:{reader.line_num}", str(error))
    except ValueError as error:
        problems.add("caption_not_utf8", name, str(error))


def _parquet(path: Path, name: str, columns: tuple[str, str], *, problems: Problems) -> _Cells:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            header = file.schema_arrow.names
            if not _has_columns(name, columns, header, problems=problems):
                return
            for batch in file.iter_batches(batch_size=8192, columns=list(columns)):
                cells = [batch.column(column).to_pylist() for column in columns]
                for file_name, caption in zip(*cells, strict=True):
                    number += 1
                    yield number, file_name, caption
    except UnicodeDecodeError as error:
        problems.add("caption_not_utf8", f"{name}, after row {number}", str(error))
    except (pa.ArrowException, OSError) as error:
        problems.add("broken_metadata", name, str(error).splitlines()[0])


def _has_columns(
    name: str, columns: tuple[str, str], header: list[str], *, problems: Problems
) -> bool:
    """Return whether a table has each of two columns once; else add the problem."""
    for separator, word in ((";", "semicolons"), ("\t", "tabs")):
        cells = header[0].split(separator) if len(header) == 1 else []
        if len(cells) > 1:
            detail = f"cells are separated by {word}. Fix: write it anew with commas"
            problems.add("broken_metadata", f"{name}:1", detail)
            return False
    if twice := [column for column in columns if header.count(column) > 1]:
        problems.add("broken_metadata", f"{name}:1", listed_twice(twice[0]))
        return False
    if all(column in header for column in columns):
        return True
    _missing_column(name, columns, header, problems=problems)
    return False


def _missing_column(
    name: str, columns: tuple[str, str], header: list[str], *, problems: Problems
) -> None:
    file_column, caption_column = columns
    if file_column in header:
        detail = no_column(caption_column, header, file_column=file_column)
        problems.add("no_column", name, detail)
        return
    there = ", ".join(header) or "none"
    fix = f'name the column of file names "{file_column}"'
    detail = f'no column "{file_column}"; the columns are: {there}. Fix: {fix}'
    problems.add("no_column", name, detail)


def path_below(file_name: Any, folder: str, *, where: str, problems: Problems) -> str | None:
    """Return the path below the root of a file that a table in `folder` names, None for a fault."""
    if not isinstance(file_name, str) or not file_name.strip():
        problems.add("file_name_type", where, f"got {_shown(file_name)}")
        return None
    if not is_utf8(file_name):
        problems.add("half_character", where, f"got {_shown(file_name)}")
        return None
    parts = file_name.replace("\\", "/").split("/")
    if ".." in parts or not parts[0] or file_name[1:3] in (":\\", ":/"):
        problems.add("outside", where, f"got {_shown(file_name)}")
        return None
    path = posixpath.join(folder, file_name)
    return path if "./" not in path and "//" not in path else posixpath.normpath(path)


def _captions(
    value: Any, where: str, *, column: str, file_name: str, problems: Problems
) -> list[str] | None:
    texts = to_texts(value)
    if texts is None:
        problems.add("caption_type", where, f'"{column}" is {_shown(value)}')
        return None
    captions = []
    for text in texts:
        caption, had_controls = clean_caption(text)
        if had_controls:
            problems.add("control_characters", where, file_name)
        if not caption:
            problems.add("empty_caption", where, file_name)
        captions.append(caption)
    return captions


def _shown(value: Any) -> str:
    return "null" if value is None else ascii(value)[:80]


def _lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a file as `decoded_lines` does."""
    with path.open("rb") as file:
        yield from decoded_lines(file)
