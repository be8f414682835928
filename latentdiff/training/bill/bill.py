"""A model's bill of materials: hashes of its data, base, weights, config and code under one root.

The tree is that of RFC 6962: leaf = sha256(0x00 | entry), node = sha256(0x01 | left | right). It
proves integrity, not authorship: whoever changes everything can write a new root. Does not answer
for: hashing files (contents.py), gathering what a run reads (materials.py). Loads no PyTorch.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple

VERSION = 2
SECTIONS = ("config", "code", "base", "data")  # of a segment
KEY_BYTES = 32
WEIGHTS, HEADER = ".safetensors", "#header"  # ends of entries: a file's tensors, its metadata
ARTIFACTS = (  # what text-to-image training exports
    *("pipeline", "pipeline_learned_variance", "lora", "controlnet"),
    *("lora_kohya.safetensors", "learned_embeds.safetensors"),
)
OF_VAE, OF_CLIP = ("vae", "vae_tiny"), ("clip", "text_encoder", "tokenizer")  # of their recipes
MADE_OF = ("single_file", "packed", "averaged", "converted_lora")  # later, of another export


class Leaf(NamedTuple):
    """One image of the training data; all hashes are sha256 in hex.

    key: of the name, by which leaves are in order; name: "" where the bill holds hashes alone;
    split: "train", "heldout" or "class"; image: of the file's bytes; captions: of their list, in
    the order by which training chooses; companions: of the files of its mask and conditions.
    """

    key: str
    name: str
    split: str
    image: str
    captions: str
    companions: tuple[str, ...] = ()

    def entry(self) -> bytes:
        """Return what the tree has of it, the same with and without the name."""
        return canonical_texts([self.key, self.split, self.image, self.captions, *self.companions])


@dataclass(frozen=True)
class Segment:
    """What a run was made of from an optimiser step on, until the next segment begins.

    config: settings that belong to no machine; code: source, versions and machine; base: by role
    (model, vae, ...) name and sha256; data: root over the images, their number, and the root over
    class images. All are empty where they were not recorded. content: summary in Markdown.
    """

    from_step: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    content: str = ""

    def is_as(self, other: "Segment") -> bool:
        """Return whether two segments were made of the same."""
        return all(getattr(self, part) == getattr(other, part) for part in SECTIONS)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Bill:
    """What an exported folder or file was made of, and what it holds.

    segments: one, but for a run that was resumed with something changed; files: `contents` of the
    export; artifact: its name in the run, one of ARTIFACTS, OF_VAE or OF_CLIP, or how it was made
    of another export, one of MADE_OF; made_from: artifact and root of that one; leaves: of the last
    segment's images, None where only their root is known.
    """

    segments: tuple[Segment, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    artifact: str = ""
    leaves: tuple[Leaf, ...] | None = None
    made_from: Mapping[str, str] = field(default_factory=dict)

    @property
    def last(self) -> Segment:
        """The segment that training ended with."""
        return self.segments[-1]

    def made_of(self) -> dict[str, str]:
        """Return the hash of config, code, base and data over all segments, by their name."""
        return {
            part: digest(canonical([[one.from_step, getattr(one, part)] for one in self.segments]))
            for part in SECTIONS
        }

    @property
    def root(self) -> str:
        """The sha256 root (hex) over all parts."""
        own = {"artifact": self.artifact, "files": digest(canonical(self.files))}
        if self.made_from:
            own["made_from"] = digest(canonical(self.made_from))
        return merkle_root(canonical(list(item)) for item in sorted((self.made_of() | own).items()))


def is_weights(entry: str) -> bool:
    """Return whether an entry of `Bill.files` is of tensors."""
    return entry.endswith(WEIGHTS)


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
        digest(canonical_texts(captions)),
        tuple(one.hex() for one in companions),
    )


def images_root(leaves: Iterable[Leaf]) -> str:
    """Return the root over images, in whatever order they come.

    Of each, its key and hash alone are held: 100 bytes.
    """
    hashed = sorted(bytes.fromhex(leaf.key) + _leaf_hash(leaf.entry()) for leaf in leaves)
    return _root_of([one[KEY_BYTES:] for one in hashed])


def merkle_root(entries: Iterable[bytes]) -> str:
    """Return the root (hex) of RFC 6962 (section 2.1) over entries in their order."""
    return _root_of([_leaf_hash(entry) for entry in entries])


def _leaf_hash(entry: bytes) -> bytes:
    return hashlib.sha256(b"\0" + entry).digest()


def _root_of(level: list[bytes]) -> str:
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        above = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs]
        level = above + level[len(level) - len(level) % 2 :]  # one without a partner moves up
    return level[0].hex() if level else digest(b"")


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value that hashes are taken of."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode()


def canonical_texts(texts: Iterable[str]) -> bytes:
    """Return `canonical` of a list of texts, in a fifth of the time."""
    return f"[{','.join(map(encode_basestring_ascii, texts))}]".encode()


def digest(content: bytes) -> str:
    """Return the sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def to_text(bill: Bill, *, with_images: bool) -> str:
    """Return the JSON of the sidecar, an image a line, or of a header, which has no images."""
    entries: dict[str, Any] = {
        "version": VERSION,
        "root": bill.root,
        "artifact": bill.artifact,
        "segments": [
            {name: value for name, value in one.to_json().items() if name != "content"}
            for one in bill.segments
        ],
        "files": dict(bill.files),
    }
    if bill.made_from:
        entries["made_from"] = dict(bill.made_from)
    text = json.dumps(entries, ensure_ascii=False)
    if not with_images or bill.leaves is None:
        return text
    rows = [
        json.dumps([leaf.name or {"sha256": leaf.key}, *leaf[2:5], *leaf.companions])
        for leaf in sorted(bill.leaves, key=lambda leaf: (leaf.name, leaf))
    ]
    return f'{text[:-1]}, "images": [\n' + ",\n".join(rows) + "\n]}\n"


def from_text(text: str, *, where: str) -> tuple[Bill, str]:
    """Return the bill of such a text and the root that it states; ValueError names `where`."""
    try:
        entries = json.loads(text)
        version = entries["version"]
        if version == VERSION:
            return _from_json(entries), str(entries["root"])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{where} is no bill of materials ({error!r}); take the one that training wrote"
        ) from error
    raise ValueError(
        f"{where} is a bill of materials of version {version}, expected {VERSION}; use the version "
        "of LatentDiff that wrote it"
    )


def _from_json(entries: Mapping[str, Any]) -> Bill:
    segments = tuple(Segment(**one) for one in entries["segments"])
    for one in segments:
        if not all(isinstance(getattr(one, part), dict) for part in SECTIONS):
            raise TypeError(f"a segment's {', '.join(SECTIONS)} must be objects")
    made_from = {str(key): str(one) for key, one in entries.get("made_from", {}).items()}
    known = MADE_OF if made_from else (*ARTIFACTS, *OF_VAE, *OF_CLIP)
    if not segments or entries["artifact"] not in known:
        raise ValueError(f"artifact must be one of {', '.join(known)}, and have a segment")
    rows = entries.get("images")
    return Bill(
        segments,
        files={str(name): str(value) for name, value in entries["files"].items()},
        artifact=entries["artifact"],
        leaves=None if rows is None else tuple(map(_leaf, rows)),
        made_from=made_from,
    )


def _leaf(row: Sequence[Any]) -> Leaf:
    name, split, image, captions, *companions = row
    is_named = isinstance(name, str)
    key = digest(name.encode("utf-8", "surrogatepass")) if is_named else str(name["sha256"])
    if len(bytes.fromhex(key)) != KEY_BYTES:
        raise ValueError(f"{key} is no sha256")
    hashes = str(split), str(image), str(captions), tuple(map(str, companions))
    return Leaf(key, name if is_named else "", *hashes)
