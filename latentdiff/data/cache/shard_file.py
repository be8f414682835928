"""One file of the cache: a safetensors shard of equal tensors, addressed by key, proof against
damage.

A shard is written once, atomically, under the hash of its header, and never changed. The header
holds a hash of the keys and row checksums, and every row is checked when it is read: damaged rows
are never returned. Ours: safetensors itself has no checksums.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from latentdiff.atomic import write_bytes

logger = logging.getLogger(__name__)
FORMAT = "latentdiff-cache-1"
KEY_BYTES = 16  # of a SHA-256
MAX_HEADER_BYTES = 1 << 16
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class DamagedShardError(ValueError):
    """A shard that differs from what was written; the message names the difference."""


def key_of(start: bytes, content: bytes) -> bytes:
    """Hash an entry: `start`, which all entries share, and its own content."""
    return hashlib.sha256(start + content).digest()[:KEY_BYTES]


def as_keys(keys: Iterable[bytes]) -> np.ndarray:
    """Turn the results of `key_of` into (N, 2) uint64."""
    return np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Shard:
    """Where one file's rows lie. start: first byte of row 0; shape: of a row; checks: (N,) CRC-32
    of each row's bytes."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    checks: np.ndarray

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape))


def write_shard(folder: Path, keys: np.ndarray, *, rows: Tensor) -> Path:
    """Write rows (N, ...) under keys (N, 2) to a file of their own, and return its path."""
    data = rows.reshape(len(rows), -1).view(torch.uint8).numpy()
    checks = np.array([zlib.crc32(row) for row in data], np.uint32)
    tensors = {
        "rows": rows,
        "keys": torch.from_numpy(np.ascontiguousarray(keys).view(np.uint8).copy()),
        "checks": torch.from_numpy(checks.view(np.uint8)),
    }
    metadata = {"format": FORMAT, "index_sha256": _index_hash(keys, checks)}
    content = save(tensors, metadata)
    header = content[: 8 + struct.unpack("<Q", content[:8])[0]]
    path = folder / f"{_name_of(header)}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return path


def read_shard(path: Path) -> tuple[Shard, np.ndarray]:
    """Read a shard's index and its keys (N, 2), not its rows. Raises DamagedShardError, or
    FileNotFoundError."""
    with open(path, "rb") as file:
        try:
            return _read_index(path, file)
        except DamagedShardError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DamagedShardError(f"the header is not one of a cache: {error!r}") from error


def _read_index(path: Path, file: BinaryIO) -> tuple[Shard, np.ndarray]:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise DamagedShardError(f"no header in {size:,} bytes")
    text = file.read(length)
    if _name_of(head + text) != path.stem:
        raise DamagedShardError("the header is not the one that was written")
    header = json.loads(text)
    start = 8 + length
    end = start + max(tensor["data_offsets"][1] for k, tensor in header.items() if k[0] != "_")
    if end != size:
        raise DamagedShardError(f"expected {end:,} bytes, got {size:,}")
    keys = _read_part(file.fileno(), start, header["keys"]).view(np.uint64).reshape(-1, 2)
    checks = _read_part(file.fileno(), start, header["checks"]).view(np.uint32)
    if _index_hash(keys, checks) != header["__metadata__"]["index_sha256"]:
        raise DamagedShardError("its keys are not those that were written")
    rows = header["rows"]
    low, high = rows["data_offsets"]
    shard = Shard(path, start + low, tuple(rows["shape"][1:]), DTYPES[rows["dtype"]], checks)
    if (
        not len(keys) == len(checks) == rows["shape"][0]
        or shard.row_bytes * len(keys) != high - low
    ):
        raise DamagedShardError("its rows are not as many, or not as large, as its keys say")
    return shard, keys


def quarantine(path: Path, error: DamagedShardError) -> None:
    """Rename a damaged shard, so that no process uses it, and warn."""
    logger.warning("the cache file %s is damaged (%s); its entries are encoded anew", path, error)
    with contextlib.suppress(OSError):  # another process did it, or the folder is read-only
        path.rename(path.with_suffix(".damaged"))


def _name_of(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()[:32]


def _index_hash(keys: np.ndarray, checks: np.ndarray) -> str:
    return hashlib.sha256(keys.tobytes() + checks.tobytes()).hexdigest()


def _read_part(file: int, start: int, tensor: dict[str, Any]) -> np.ndarray:
    low, high = tensor["data_offsets"]
    if not 0 <= low <= high:
        raise DamagedShardError(f"a part from byte {low} to {high}")
    return np.frombuffer(os.pread(file, high - low, start + low), np.uint8)


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file for reading."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_row(shard: Shard, row: int, *, data: mmap.mmap) -> Tensor:
    """Copy one row out of the mapped file. Raises DamagedShardError."""
    start = shard.start + row * shard.row_bytes
    content = bytearray(data[start : start + shard.row_bytes])
    if zlib.crc32(content) != shard.checks[row]:
        raise DamagedShardError(f"row {row} has another checksum than was written")
    return torch.frombuffer(content, dtype=shard.dtype).reshape(shard.shape)


def check_rows(shard: Shard) -> None:
    """Read all rows. Raises DamagedShardError."""
    with map_file(shard.path) as data:
        for row in range(len(shard.checks)):
            read_row(shard, row, data=data)
