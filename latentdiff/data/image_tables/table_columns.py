"""Which columns of a table are the image and its caption, and captions as texts."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from latentdiff.data.captions import clean_caption
from latentdiff.data.folder.caption_tables import CaptionRules
from latentdiff.data.folder.metadata import listed_twice, no_column, to_texts

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")


class UnusableTableError(Exception):
    """Why a table cannot be used: a key of problems.REASONS, and what was found."""

    def __init__(self, key: str, detail: str) -> None:
        super().__init__(detail)
        self.key, self.detail = key, detail


class TableColumns(NamedTuple):
    """Places in the schema: of the image, of the caption (None: no caption is wanted)."""

    image: int
    caption: int | None
    class_names: list[str] | None  # of whole numbers in the caption's column


def choose_columns(schema: pa.Schema, rules: CaptionRules) -> TableColumns | None:
    """Choose the columns; None for a table without images.

    The image is `rules.file_column` where that holds bytes, else "image", else the only column of
    images. Raises UnusableTableError where columns do not decide, or the captions are no texts.
    """
    images = image_columns(schema, rules.file_column)
    if not images:
        return None
    chosen = next((n for n in (rules.file_column, "image") if n in images), images[0])
    if chosen not in (rules.file_column, "image") and len(set(images)) > 1:
        raise UnusableTableError(
            "no_column",
            f"images are in the columns {', '.join(images)}. Fix: name one of them, "
            f"--data.file_column={chosen}",
        )
    names = list(schema.names)
    for name in (chosen, rules.caption_column):
        if names.count(name) > 1:
            raise UnusableTableError("broken_metadata", listed_twice(name))
    if rules.caption_column not in names:
        if rules.missing_caption == "empty":
            return TableColumns(names.index(chosen), None, None)
        others = [name for name in names if name not in images]
        raise UnusableTableError("no_column", no_column(rules.caption_column, others))
    place = names.index(rules.caption_column)
    class_names = _class_names(schema, rules.caption_column)
    _check_caption_type(schema.field(place), class_names)
    return TableColumns(names.index(chosen), place, class_names)


def image_columns(schema: pa.Schema, file_column: str) -> list[str]:
    """Name the columns that hold images."""
    return [field.name for field in schema if _is_image(field, file_column)]


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column's type is a text, or lists of texts."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def captions_of(
    column: pa.Array, *, class_names: list[str] | None, missing: str
) -> Iterator[tuple[list[str] | None, str | None, str | None]]:
    """Yield each row's captions, or None, with a problem and its detail.

    missing: the policy for a null: "empty" gives the empty caption.
    """
    empty = ([""], "empty_caption", None) if missing == "empty" else (None, "no_caption", None)
    for cell in column.to_pylist():
        value = cell
        if class_names is not None and isinstance(cell, int):
            value = class_names[cell] if 0 <= cell < len(class_names) else None
        if value is None or value == []:
            yield empty
            continue
        texts = to_texts(value)
        if texts is None:
            yield None, "caption_type", f"got {ascii(value)[:80]}"
            continue
        cleaned = [clean_caption(text) for text in texts]
        note = "control_characters" if any(had for _, had in cleaned) else None
        if not all(caption for caption, _ in cleaned):
            note = "empty_caption"
        yield [caption for caption, _ in cleaned], note, None


def _is_image(field: pa.Field, file_column: str) -> bool:
    """Return whether a column holds images: a struct of `datasets`, or bytes of a known name."""
    if pa.types.is_struct(field.type):
        place = field.type.get_field_index("bytes")
        return place >= 0 and _is_binary(field.type.field(place).type)
    return _is_binary(field.type) and field.name.lower() in (*IMAGE_NAMES, file_column)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _check_caption_type(field: pa.Field, class_names: list[str] | None) -> None:
    kind = field.type
    if pa.types.is_integer(kind) and class_names:
        return
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (is_text(kind) or pa.types.is_null(kind)):
        raise UnusableTableError("caption_type", f'"{field.name}" is of type {field.type}'[:200])


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Read the names of a column's classes, as `datasets` writes them into the schema."""
    try:
        info: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    is_texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_texts else None
