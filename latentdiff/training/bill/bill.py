"""A model's bill of materials: hashes of its data, base, weights, config and code under one root.

The tree is that of RFC 6962: leaf = sha256(0x00 | entry), node = sha256(0x01 | left | right). The
sidecar holds all of it, the header of a safetensors file all but the images. It proves integrity,
not authorship: whoever changes everything can write a new root. Loads no PyTorch.
"""

import hashlib
import json
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from latentdiff.atomic import atomic_file, write_text
from latentdiff.pipeline.files.model_info import BILL_KEY

BILL_NAME = "bill_of_materials.json"  # the sidecar, in the model's folder
CONFIGS = ("*.json", "*.txt")
VERSION = 1
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors
CHUNK = 1 << 24  # bytes hashed or copied at a time


class Leaf(NamedTuple):
    """One image of the training data; all hashes are sha256 in hex.

    key: of the name, by which leaves are in order; name: "" where the bill holds hashes alone;
    split: "train" or "heldout"; image: of the file's bytes; captions: of their sorted list;
    companions: of the files of its mask and conditions, in their order.
    """

    key: str
    name: str
    split: str
    image: str
    captions: str
    companions: tuple[str, ...] = ()

    def entry(self) -> bytes:
        """Return what the tree has of it, the same with and without the name."""
        return canonical([self.key, self.split, self.image, self.captions, *self.companions])


@dataclass(frozen=True)
class Bill:
    """What a model was made of.

    images: sha256 root over the leaves; weights: of the exported tensors; files: sha256 of each
    config and vocabulary next to them, by its path in the folder; base: by role (model,
    vae, ...) its name and sha256; artifact: the name of the folder or file in its run; leaves: None
    where only the root is known.
    """

    config: Mapping[str, Any]
    code: Mapping[str, Any]
    base: Mapping[str, Any]
    images: str
    num_images: int
    weights: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    artifact: str = ""
    leaves: tuple[Leaf, ...] | None = None

    def sections(self) -> dict[str, str]:
        """Return the hash of each part, by its name."""
        return {
            "base": digest(canonical(self.base)),
            "code": digest(canonical(self.code)),
            "config": digest(canonical(self.config)),
            "data": self.images,
            "files": digest(canonical(self.files)),
            "weights": self.weights,
        }

    @property
    def root(self) -> str:
        """The sha256 root (hex) over all parts."""
        return root_of_sections(self.sections())


def root_of_sections(sections: Mapping[str, str]) -> str:
    """Return the root over the hashes of the parts, in order of their names."""
    return merkle_root(canonical(list(item)) for item in sorted(sections.items()))


def make_leaf(
    name: str,
    *,
    split: str,
    image: bytes,
    captions: Iterable[str],
    companions: Sequence[bytes] = (),
    keeps_name: bool = True,
) -> Leaf:
    """Return the leaf of an image. name, captions: in Unicode's NFC; image: sha256 of its file."""
    return Leaf(
        digest(name.encode("utf-8", "surrogatepass")),
        name if keeps_name else "",
        split,
        image.hex(),
        digest(canonical(sorted(captions))),
        tuple(one.hex() for one in companions),
    )


def images_root(leaves: Iterable[Leaf]) -> str:
    """Return the root over images, in whatever order they come."""
    return merkle_root(leaf.entry() for leaf in sorted(leaves))


def merkle_root(entries: Iterable[bytes]) -> str:
    """Return the root (hex) of RFC 6962 (section 2.1) over entries in their order."""
    level = [hashlib.sha256(b"\0" + entry).digest() for entry in entries]
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        above = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs]
        level = above + level[len(level) - len(level) % 2 :]  # one without a partner moves up
    return level[0].hex() if level else digest(b"")


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value that hashes are taken of."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode()


def digest(content: bytes) -> str:
    """Return the sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def to_json(bill: Bill, *, with_images: bool) -> dict[str, Any]:
    """Return the entries of the sidecar, or of a file's header, which has no images."""
    entries: dict[str, Any] = {
        "version": VERSION,
        "root": bill.root,
        "sections": bill.sections(),
        "artifact": bill.artifact,
        "num_images": bill.num_images,
        **{"base": bill.base, "code": bill.code, "config": bill.config, "files": bill.files},
    }
    if with_images and bill.leaves is not None:
        entries["images"] = [
            [leaf.name or {"sha256": leaf.key}, *leaf[2:5], *leaf.companions]
            for leaf in sorted(bill.leaves, key=lambda leaf: (leaf.name, leaf))
        ]
    return entries


def from_json(entries: Any, *, where: str) -> Bill:
    """Return the bill of such entries, of which only the form is checked; ValueError names it."""
    try:
        if entries["version"] != VERSION:
            raise ValueError(
                f"{where} is a bill of materials of version {entries['version']}, expected "
                f"{VERSION}; use the version of LatentDiff that wrote it"
            )
        sections = {str(name): str(value) for name, value in entries["sections"].items()}
        rows = entries.get("images")
        return Bill(
            config=dict(entries["config"]),
            code=dict(entries["code"]),
            base={role: dict(value) for role, value in entries["base"].items()},
            images=sections["data"],
            num_images=int(entries["num_images"]),
            weights=sections["weights"],
            files={str(name): str(value) for name, value in entries["files"].items()},
            artifact=str(entries["artifact"]),
            leaves=None if rows is None else tuple(map(_leaf, rows)),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{where} is no bill of materials ({error!r}); take the one that training wrote"
        ) from error


def _leaf(row: Sequence[Any]) -> Leaf:
    name, split, image, captions, *companions = row
    key = digest(name.encode("utf-8", "surrogatepass")) if isinstance(name, str) else name["sha256"]
    shown = name if isinstance(name, str) else ""
    return Leaf(str(key), shown, str(split), str(image), str(captions), tuple(map(str, companions)))


def sign_folder(folder: Path, bill: Bill, *, artifact: str) -> Bill:
    """Write the bill of a model's folder into it, and the root into its weights; return it.

    Its hash of the weights is of all safetensors files below the folder.
    """
    files = weight_files_below(folder)
    weights = tensors_digest(files, root=folder)
    own = replace(bill, weights=weights, files=file_hashes_below(folder), artifact=artifact)
    text = json.dumps(to_json(own, with_images=True), ensure_ascii=False, indent=None)
    write_text(folder / BILL_NAME, text.replace('], ["', '],\n["') + "\n")
    first = [path for path in files if path.parent.name == "unet"] or files
    add_to_header(first[0], _header(own))
    return own


def sign_file(path: Path, bill: Bill) -> Bill:
    """Write the bill of a file of weights, without images, into its header; return it."""
    weights = tensors_digest([path], root=path.parent)
    own = replace(bill, weights=weights, artifact=path.name)
    add_to_header(path, _header(own))
    return own


def _header(bill: Bill) -> dict[str, str]:
    return {BILL_KEY: canonical(to_json(bill, with_images=False)).decode()}


def weight_files_below(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder and its sub-folders, by name."""
    return sorted(folder.rglob("*.safetensors"))


def file_hashes_below(folder: Path) -> dict[str, str]:
    """Return the sha256 of each config and vocabulary of a model's folder, by its path in it.

    Not of the lists of shards, which may be cut otherwise, nor of what is written for people.
    """
    files = [path for ending in CONFIGS for path in folder.rglob(ending)]
    return {
        path.relative_to(folder).as_posix(): digest(path.read_bytes())
        for path in sorted(files)
        if path.name != BILL_NAME and not path.name.endswith(".index.json")
    }


def tensors_digest(files: Sequence[Path], *, root: Path) -> str:
    """Hash the tensors of safetensors files: names, types, shapes and bytes, by name.

    The same however they are shared out over the files of a folder, and whatever the headers say
    besides. Names begin with the folder below `root`. ValueError for a damaged file.
    """
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        start, header = read_header(path)
        part = path.parent.relative_to(root).as_posix()
        for name, facts in header.items():
            if name != "__metadata__":
                tensors[f"{part}/{name}"] = path, start, facts
    whole = hashlib.sha256()
    for name, (path, start, facts) in sorted(tensors.items()):
        whole.update(canonical([name, facts["dtype"], facts["shape"]]))
        first, last = facts["data_offsets"]
        _hash_part(whole, path, start + first, start + last)
    return whole.hexdigest()


def _hash_part(whole: Any, path: Path, first: int, last: int) -> None:
    if first == last:
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        for at in range(first, last, CHUNK):
            whole.update(content[at : min(at + CHUNK, last)])


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a safetensors file begin, and its header."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
        text = file.read(size) if size <= MAX_HEADER else b""
    try:
        header = json.loads(text)
        ends = [facts["data_offsets"][1] for name, facts in header.items() if name[:2] != "__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file; copy or download it again") from error
    if (end := 8 + size + max(ends, default=0)) != path.stat().st_size:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, expected {end:,}; copy or download it again"
        )
    return 8 + size, header


def add_to_header(path: Path, entries: Mapping[str, str]) -> None:
    """Add texts to the metadata of a safetensors file; its tensors stay as they are."""
    start, header = read_header(path)
    header["__metadata__"] = {**header.get("__metadata__", {}), **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary:
        _write_with_header(temporary, text, tensors=path, start=start)


def _write_with_header(target: Path, header: bytes, *, tensors: Path, start: int) -> None:
    with tensors.open("rb") as source, target.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        source.seek(start)
        while part := source.read(CHUNK):
            file.write(part)
