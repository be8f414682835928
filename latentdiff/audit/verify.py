"""Compare a model with its bill of materials: weights, settings, training data, base, and a rerun.

The answer is yes or no for each part; where the sidecar is there, images are named.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

from latentdiff.atomic import write_text
from latentdiff.config.io import load_stored_config
from latentdiff.config.text_to_image import Config
from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline.files.model_info import BILL_KEY
from latentdiff.training.bill.bill import (
    BILL_NAME,
    Bill,
    Leaf,
    file_hashes_below,
    from_json,
    images_root,
    read_header,
    root_of_sections,
    tensors_digest,
    weight_files_below,
)
from latentdiff.training.bill.materials import base_hash, read_data_folders, read_leaves

Answer = Literal["same", "differs", "not checked"]
ROOT_IN_CARD = re.compile(r"bill of materials \| ([0-9a-f]{64}) \|")


@dataclass(frozen=True)
class Finding:
    """What was found of one part of the bill. details: a line each, such as a changed image."""

    part: str
    answer: Answer
    details: Sequence[str] = ()


@dataclass(frozen=True)
class StoredBill:
    """A bill as it lies with a model, and the claims that go with it, which may contradict it.

    place: the model's folder or file; claims: (where, root) wherever a root is stated; sections: as
    the bill states them.
    """

    place: Path
    bill: Bill
    sections: Mapping[str, str]
    claims: Sequence[tuple[str, str]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Verdict:
    """The findings of all parts, and the root of the bill."""

    root: str
    findings: Sequence[Finding]

    @property
    def is_proven(self) -> bool:
        """Whether nothing that was checked differs."""
        return all(finding.answer != "differs" for finding in self.findings)


def verify(
    model: str, *, data: Sequence[str] = (), base: str | None = None, root: str | None = None
) -> Verdict:
    """Compare a model's folder, run or file with its bill, and what else is given.

    data: the data folder, or one for each source in their order; base: the model that training
    started from; root: as it was published. Raises FileNotFoundError or ValueError where there is
    no bill, or a folder cannot be read.
    """
    stored = read_bill(model)
    claims = [*stored.claims, *([("--root", root)] if root else [])]
    findings = [*_check_statement(stored, claims), _check_weights(stored), _check_files(stored)]
    try:
        findings.append(_check_data(stored.bill, data))
    except ValueError:
        if all(finding.answer != "differs" for finding in findings):
            raise
        findings.append(Finding("data", "not checked", ["by the settings that the bill has now"]))
    findings.append(_check_base(stored.bill, base))
    return Verdict(stored.bill.root, findings)


def read_bill(model: str) -> StoredBill:
    """Read the bill of a model's folder, of a run's, or of a file of weights."""
    place = Path(resolve_model(model))
    if not place.exists():
        raise FileNotFoundError(f"{model} does not exist, expected a model's folder or file")
    files = weight_files_below(place) if place.is_dir() else [place]
    headers = [(path, _header_entries(path)) for path in files]
    signed = [(path, entries) for path, entries in headers if entries is not None]
    sidecar = place / BILL_NAME
    if place.is_dir() and sidecar.is_file():
        where, entries = str(sidecar), _parse(sidecar.read_text(encoding="utf-8"), str(sidecar))
    elif signed:
        where, entries = str(signed[0][0]), signed[0][1]
    else:
        raise ValueError(
            f"{model} has no bill of materials: expected {BILL_NAME} in its folder, or the entry "
            f"{BILL_KEY} in a safetensors file; training writes both unless "
            "data.bill_of_materials=none"
        )
    bill = from_json(entries, where=where)
    claims = [(where, str(entries.get("root")))]
    claims += [(str(path), str(other.get("root"))) for path, other in signed]
    card = place / "README.md"
    if card.is_file() and (found := ROOT_IN_CARD.search(card.read_text(encoding="utf-8"))):
        claims.append((str(card), found[1]))
    return StoredBill(place, bill, dict(entries["sections"]), claims)


def _header_entries(path: Path) -> dict[str, Any] | None:
    text = read_header(path)[1].get("__metadata__", {}).get(BILL_KEY)
    return None if text is None else _parse(text, str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the bill of materials in {where} is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"the bill of materials in {where} is no JSON object")
    return entries


def _check_statement(stored: StoredBill, claims: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Compare the bill's parts with the hashes that it states of them, and every stated root."""
    computed = stored.bill.sections()
    for part in ("config", "code"):
        is_same = stored.sections.get(part) == computed[part]
        yield _finding(part, [] if is_same else [f"the {part} is not that of its stated hash"])
    details = [
        f"{where} states {root[:16]}..., computed {stored.bill.root[:16]}..."
        for where, root in claims
        if root != stored.bill.root
    ]
    details += [
        f"the bill's {part} is not that of its stated hash"
        for part in ("base", "files")
        if stored.sections.get(part) != computed[part]
    ]
    if root_of_sections(stored.sections) != stored.bill.root:
        details.append("the hashes of the bill's parts do not give its root")
    if (leaves := stored.bill.leaves) is not None and images_root(leaves) != stored.bill.images:
        details.append("the bill's list of images is not the one that its root is of")
    yield _finding("root", details)


def _check_weights(stored: StoredBill) -> Finding:
    place = stored.place
    files, root = (weight_files_below(place), place) if place.is_dir() else ([place], place.parent)
    found = tensors_digest(files, root=root)
    is_same = found == stored.bill.weights
    return _finding("weights", [] if is_same else [f"the tensors of {place} are others"])


def _check_files(stored: StoredBill) -> Finding:
    """Compare the configs and vocabularies that the bill lists; others may be there too."""
    known = stored.bill.files
    if not known:
        return Finding("files", "not checked", ["a file of weights alone has none"])
    found = file_hashes_below(stored.place)
    details = [
        f"{'changed' if name in found else 'removed':8} {name}"
        for name, one in known.items()
        if found.get(name) != one
    ]
    return _finding("files", details)


def _check_base(bill: Bill, base: str | None) -> Finding:
    if not base:
        missing = [f"{facts['name']}; give --base" for facts in bill.base.values()]
        return Finding("base", "not checked", missing[:1] or ["none: trained from scratch"])
    if not bill.base:
        return _finding("base", [f"--base={base}, and the model was trained from scratch"])
    for role, facts in bill.base.items():
        if base_hash(base, role=role) == facts["sha256"]:
            return Finding("base", "same")
    names = ", ".join(f"{role} {facts['name']}" for role, facts in bill.base.items())
    return _finding("base", [f"the weights of {base} are not those of {names}"])


def _check_data(bill: Bill, data: Sequence[str]) -> Finding:
    if not data:
        return Finding("data", "not checked", ["give --data"])
    with TemporaryDirectory() as scratch:  # so that every file is read, none is known by its time
        config = config_of(bill, data=data, folder=Path(scratch))
        leaves = list(read_leaves(read_data_folders(config), config))
    if images_root(leaves) == bill.images:
        return Finding("data", "same", [f"{len(leaves):,} images"])
    details = [*differences(bill.leaves, leaves)] if bill.leaves is not None else []
    if not details:
        details = [
            f"{len(leaves):,} images, expected {bill.num_images:,}; the folder of the model tells "
            "which differ, a file alone does not"
        ]
    return _finding("data", details)


def config_of(
    bill: Bill, *, data: Sequence[str] = (), base: str | None = None, folder: Path
) -> Config:
    """Return the settings of a bill, for these data folders and base model, writing to `folder`.

    ValueError where there are more or fewer folders than sources.
    """
    settings = folder / "settings.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(settings, yaml.safe_dump(dict(bill.config), allow_unicode=True))
    config: Config = load_stored_config(settings, Config)
    num = len(config.data.sources) or 1
    if data and len(data) != num:
        raise ValueError(f"--data names {len(data)} folders, expected {num}, in the run's order")
    sources = [
        replace(source, root=root) for source, root in zip(config.data.sources, data, strict=False)
    ]
    changed = replace(
        config.data,
        root="" if config.data.sources or not data else data[0],
        sources=tuple(sources) or config.data.sources,
        cache_dir=str(folder / "cache"),
    )
    model = config.model
    if base and model.pretrained:
        model = replace(model, pretrained=base)
    elif base:
        model = replace(model, vae=base)
    return replace(config, data=changed, model=model, output_dir=str(folder / "run"))


def differences(before: Sequence[Leaf], now: Sequence[Leaf]) -> Iterator[str]:
    """Yield a line for each image that was added, changed or removed, by name where it is known."""
    old, new = _by_key(before), _by_key(now)
    names = {leaf.key: leaf.name for leaf in (*now, *before) if leaf.name}
    order = sorted({*old, *new}, key=lambda key: (names.get(key, ""), key))
    for key in order:
        name = names.get(key) or f"the image whose name has the sha256 {key}"
        if key not in old:
            yield f"added    {name}"
        elif key not in new:
            yield f"removed  {name}"
        elif old[key] != new[key]:
            yield f"changed  {name}: {_what_changed(old[key][0], new[key][0])}"


def _by_key(leaves: Sequence[Leaf]) -> dict[str, list[Leaf]]:
    """Return the leaves of each name; more than one where names differ by Unicode's form alone."""
    found: dict[str, list[Leaf]] = defaultdict(list)
    for leaf in sorted(leaves):
        found[leaf.key].append(leaf._replace(name=""))
    return found


def _what_changed(before: Leaf, now: Leaf) -> str:
    shown = {
        "image": "image",
        "captions": "captions",
        "companions": "mask or condition",
        "split": f"now {now.split}, was {before.split}",
    }
    changed = [text for name, text in shown.items() if getattr(before, name) != getattr(now, name)]
    return ", ".join(changed) or "its number of files"


def _finding(part: str, details: Sequence[str]) -> Finding:
    return Finding(part, "differs" if details else "same", details)
