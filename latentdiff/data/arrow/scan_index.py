"""Tables kept between runs in a cache folder: memory-mapped arrow files.

Every table can be rebuilt, so a damaged file is the same as none. Nothing is ever written next to
the images. Ours: a database would copy rows into Python; these tables are mapped from disk.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentdiff.atomic import atomic_file

logger = logging.getLogger(__name__)
VERSION = 3  # raise it when the meaning of a stored column changes
KEPT_RECORDS = 4


class ScanIndex:
    """What is known about the folder `root`, under `cache_dir`, by table name."""

    def __init__(self, cache_dir: Path | str, root: Path) -> None:
        key = settings_hash({"root": os.path.realpath(root), "version": VERSION})
        self.folder = (
            Path(cache_dir).expanduser() / "scan" / f"{root.resolve().name or 'root'}-{key[:12]}"
        )

    def path(self, name: str) -> Path:
        """Name the file of a table."""
        return self.folder / f"{name}.arrow"

    def load(self, name: str, schema: pa.Schema) -> pa.Table | None:
        """Map a table into memory; None where there is none that can be read, of this schema."""
        table = map_table(self.path(name))
        return table if table is not None and table.schema.equals(schema) else None

    def save(self, name: str, schema: pa.Schema, *, parts: Iterable[pa.Table]) -> None:
        """Write a table, part after part, so that it need not be in memory at once.

        Where it cannot be written, a warning is logged, and the next run reads the files again.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.path(name), schema, parts)
        except OSError as error:
            logger.warning("the scan index is not kept: %s", error)

    def _write(self, path: Path, schema: pa.Schema, parts: Iterable[pa.Table]) -> None:
        with (
            atomic_file(path) as temporary,
            pa.OSFile(str(temporary), "wb") as file,
            pa.ipc.new_file(file, schema) as writer,
        ):
            for part in parts:
                writer.write_table(part, max_chunksize=max(1, len(part)))

    def touch(self, name: str) -> None:
        """Make a table the newest, as the one used last, where the disk allows it."""
        with contextlib.suppress(OSError):
            os.utime(self.path(name))

    def newest(self, prefix: str) -> str | None:
        """Name the table written last among those whose names start with `prefix`."""
        found = self._by_age(prefix)
        return found[-1].stem if found else None

    def names(self, prefix: str) -> list[str]:
        """Name the tables whose names start with `prefix`, the one written last at the end."""
        return [path.stem for path in self._by_age(prefix)]

    def prune(self, prefix: str) -> None:
        """Keep only the last few tables whose names start with `prefix`."""
        for path in self._by_age(prefix)[:-KEPT_RECORDS]:
            path.unlink(missing_ok=True)

    def _by_age(self, prefix: str) -> list[Path]:
        found = list(self.folder.glob(f"{prefix}*.arrow"))
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def map_table(path: Path) -> pa.Table | None:
    """Map a table from an arrow file into memory; None where there is none that can be read."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid):
        return None


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hash plain settings to a hexadecimal SHA-256."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def table_digest(table: pa.Table) -> str:
    """Hash a table's values to a hexadecimal SHA-256; the table must not be a slice."""
    digest = hashlib.sha256()
    for column in table.combine_chunks().columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                if buffer is not None:
                    digest.update(buffer)
    return digest.hexdigest()
