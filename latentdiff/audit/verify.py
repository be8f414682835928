"""Compare a model with its bill of materials: weights, files, training data and base.

The answer is yes or no for each part; where the sidecar is there, images are named.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

from latentdiff.atomic import write_text
from latentdiff.audit.stored_bill import CONFIG, StoredBill, read_bills
from latentdiff.config.io import load_stored_config
from latentdiff.config.text_to_image import Config
from latentdiff.data.arrow.listing import Progress
from latentdiff.data.folder.folder import read_folder
from latentdiff.training.bill.base import BASES, base_hash
from latentdiff.training.bill.bill import HEADER, Bill, Leaf, images_root, is_weights
from latentdiff.training.bill.folder_runs import BASES as FOLDER_BASES
from latentdiff.training.bill.folder_runs import (
    KINDS,
    folder_config_of,
    folder_leaves,
    public_folder_config,
    read_roots,
)
from latentdiff.training.bill.materials import (
    class_leaves,
    public_config,
    read_data_folders,
    read_leaves,
)

ROLES = tuple({**BASES, **FOLDER_BASES})  # of what a run starts from
Answer = Literal["same", "differs", "not checked"]
ROOT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Finding:
    """What was found of one part of the bill. details: a line each, such as a changed image."""

    part: str
    answer: Answer
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Given:
    """What a model is compared with.

    data: the data folder, or one for each source in their order; bases: path or id by role, one of
    ROLES, "" for the first that the bill names; class_images: of prior preservation; root: as it
    was published. ValueError for a root of another form.
    """

    data: Sequence[str] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    class_images: str = ""
    root: str = ""

    def __post_init__(self) -> None:
        root = self.root.strip().lower().removeprefix("0x")
        object.__setattr__(self, "root", root)
        if root and not ROOT.fullmatch(root):
            raise ValueError(f"--root={self.root} is no root, expected 64 hex digits")
        if unknown := set(self.bases) - {"", *ROLES}:
            raise ValueError(f"--base={unknown.pop()}=... is no role, expected {', '.join(ROLES)}")

    def base_of(self, bill: Bill, role: str) -> str:
        """Return the base that was given for a role of a bill, "" where none was."""
        is_first = role == next(iter(bill.last.base), None)
        return self.bases.get(role) or (self.bases.get("", "") if is_first else "")


@dataclass(frozen=True)
class Verdict:
    """The findings of all parts, and the root of each bill by the name of its export."""

    roots: Mapping[str, str]
    findings: Sequence[Finding]

    @property
    def is_proven(self) -> bool:
        """Whether nothing that was checked differs."""
        return all(finding.answer != "differs" for finding in self.findings)

    @property
    def not_checked(self) -> list[str]:
        """The parts on which nothing is said."""
        return [finding.part for finding in self.findings if finding.answer == "not checked"]


def verify(model: str, given: Given | None = None, *, progress: Progress | None = None) -> Verdict:
    """Compare a model's folder or file, or all that a run exported, with its bill and what is
    given.

    Raises FileNotFoundError or ValueError where there is no bill, or a folder cannot be read.
    """
    given, stored = given or Given(), read_bills(model)
    if given.root and len(stored) > 1:
        names = ", ".join(one.place.name for one in stored)
        raise ValueError(f"--root is of one export, and {model} has several: give one of {names}")
    first, findings = stored[0].bill, list[Finding]()
    for one in stored:
        name = f"{one.bill.artifact} " if len(stored) > 1 else ""
        own = [_check_root(one, first, given.root), *_check_contents(one)]
        findings += [replace(finding, part=f"{name}{finding.part}") for finding in own]
        if one.bill.made_from:
            findings.append(_made_from(one.bill))
    folder = Path(model).expanduser()
    if (folder / CONFIG).is_file() and stored[0].place != folder:
        findings.append(_check_config(first, folder / CONFIG))
    try:
        findings += _check_given(first, given, progress)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not any(finding.answer == "differs" for finding in findings):
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"the bill of {model} is not complete: {error!r}") from error
        findings.append(Finding("data, base", "not checked", ["the bill was changed, see above"]))
    return Verdict({one.bill.artifact: one.bill.root for one in stored}, findings)


def _made_from(bill: Bill) -> Finding:
    """Name the export that another was made of, by which alone its weights are shown to follow."""
    artifact, root = bill.made_from.get("artifact", ""), bill.made_from.get("root", "")
    return Finding("made from", "not checked", [f"{artifact} of root {root}; verify it too"])


def _check_given(bill: Bill, given: Given, progress: Progress | None) -> list[Finding]:
    return [
        _check_data(bill, given.data, progress=progress),
        *_check_class_images(bill, given.class_images),
        *_check_bases(bill, given),
    ]


def _check_root(stored: StoredBill, first: Bill, published: str) -> Finding:
    """Compare every root that is stated of a bill with the one that its parts give."""
    bill = stored.bill
    claims = [*stored.claims, *([("--root", published)] if published else [])]
    details = [
        f"{where} states {root[:16]}..., computed {bill.root[:16]}..."
        for where, root in claims
        if root != bill.root
    ]
    if bill.leaves is not None and images_root(bill.leaves) != bill.last.data.get("images"):
        details.append("the bill's list of images is not the one that its root is of")
    others = [part for part, one in bill.made_of().items() if one != first.made_of()[part]]
    if others:
        details.append(f"its {', '.join(others)} are not those of {first.artifact} next to it")
    if details:
        return Finding("root", "differs", details)
    names = ", ".join(_short(where, stored.place) for where, _ in claims)
    note = "" if published else "; give --root, as it was published, to compare it"
    return Finding("root", "same", [f"stated by {names}{note}"])


def _short(where: str, place: Path) -> str:
    path = Path(where)
    return path.relative_to(place).as_posix() if place in path.parents else path.name


def _check_contents(stored: StoredBill) -> Iterator[Finding]:
    """Compare every file of an export with the bill: tensors, then all others and headers."""
    known, found = stored.bill.files, stored.found()
    names = found.keys() if stored.is_lone_file else {*known, *found}
    lines = {
        name: f"{_change(name, known, found):8} {name.replace(HEADER, ': the header')}"
        for name in sorted(names)
        if known.get(name) != found.get(name)
    }
    yield _finding("weights", [line for name, line in lines.items() if is_weights(name)])
    details = [line for name, line in lines.items() if not is_weights(name)]
    rest = len(known) - len(names)
    if not details and rest:
        yield Finding(
            "files", "not checked", ["a lone file; the others of its folder are not here"]
        )
    else:
        yield _finding("files", details)


def _change(name: str, known: Mapping[str, str], found: Mapping[str, str]) -> str:
    return "added" if name not in known else "changed" if name in found else "removed"


def _check_config(bill: Bill, path: Path) -> Finding:
    """Compare the settings of a run's folder with those that training ended with."""
    kind = KINDS.get(bill.artifact)
    try:
        own = (
            public_config(load_stored_config(path, Config))
            if kind is None
            else public_folder_config(load_stored_config(path, kind))
        )
    except ValueError as error:
        return _finding("config", [str(error)])
    one, known = _flat(own), _flat(bill.last.config)
    names = sorted({*one, *known})
    return _finding("config", [f"changed  {n}" for n in names if one.get(n) != known.get(n)])


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: one if isinstance(one, dict) else {"": one} for name, one in config.items()}
    return {f"{name}.{key}": one for name, part in parts.items() for key, one in part.items()}


def _check_bases(bill: Bill, given: Given) -> Iterator[Finding]:
    """Compare each model that training started from, by its role."""
    if not bill.last.base:
        if bill.last.data:
            yield Finding("base", "same", ["none, trained from scratch"])
        else:
            yield Finding("base", "not checked", ["not recorded"])
    for role, path in given.bases.items():
        if role and role not in bill.last.base:
            yield _finding(f"base {role}", [f"{path} was given, and the bill has none"])
    for role, facts in bill.last.base.items():
        yield _check_base(bill, role, given.base_of(bill, role), facts=facts)


def _check_base(bill: Bill, role: str, path: str, *, facts: Mapping[str, str]) -> Finding:
    part = f"base {role}"
    if not path:
        return Finding(part, "not checked", [f"{facts['name']}; give --base {role}=PATH"])
    if not facts["sha256"]:
        return Finding(part, "not checked", ["training found no safetensors of it to hash"])
    details = [
        f"steps from {one.from_step} on had another, or it was not recorded"
        for one in bill.segments
        if one.base.get(role) != facts
    ]
    if base_hash(path, role=role) != facts["sha256"]:
        details.insert(0, f"{path} is not {facts['name']} as training read it")
    return _finding(part, details, [facts["name"]])


def _check_data(bill: Bill, data: Sequence[str], *, progress: Progress | None) -> Finding:
    if not data:
        return Finding("data", "not checked", ["give --data"])
    known = bill.last.data
    details = [
        f"steps from {one.from_step} on " + ("had other images" if one.data else "are not recorded")
        for one in bill.segments
        if one.data != known or not one.data
    ]
    if not known:
        return _finding("data", details)
    leaves = _leaves_again(bill, data, progress=progress)
    if images_root(leaves) == known["images"]:
        return _finding("data", details, [f"{len(leaves):,} images"])
    found = [*differences(bill.leaves, leaves)] if bill.leaves is not None else []
    return _finding(
        "data",
        found + details
        or [
            f"{len(leaves):,} images, expected {known['num_images']:,}; the folder of the model "
            "tells which differ, a file alone does not"
        ],
    )


def _leaves_again(bill: Bill, data: Sequence[str], *, progress: Progress | None) -> list[Leaf]:
    """Read the data folders as a bill's run did; every file is read, none known by its time."""
    with TemporaryDirectory() as scratch:
        if (kind := KINDS.get(bill.artifact)) is not None:
            bases = dict.fromkeys(bill.last.base, scratch)  # not read
            config = folder_config_of(
                kind, bill.last.config, data=data, bases=bases, folder=Path(scratch)
            )
            return list(folder_leaves(kind, read_roots(kind, config.roots), progress=progress))
        whole = config_of(bill, Given(data=data), folder=Path(scratch))
        folders = read_data_folders(whole, progress=progress)
        return list(read_leaves(folders, whole, progress=progress))


def _check_class_images(bill: Bill, folder: str) -> Iterator[Finding]:
    """Compare the images of prior preservation, where there are any, in the folder or below it."""
    known = bill.last.data.get("class_images")
    if known is None:
        return
    if not folder:
        yield Finding("class images", "not checked", ["give --class_images"])
        return
    num, root = bill.last.config["finetune"]["num_class_images"], Path(folder).expanduser()
    is_found = any(
        images_root(class_leaves(read_folder(path)[:num])) == known
        for path in (root, *sorted(root.iterdir()))
        if (path / "metadata.jsonl").is_file()
    )
    details = [] if is_found else [f"{folder} holds others than training read"]
    yield _finding("class images", details)


def config_of(bill: Bill, given: Given, *, folder: Path) -> Config:
    """Return the settings of a bill's last segment, for what is given, writing to `folder` alone.

    ValueError where there are more or fewer data folders than sources.
    """
    plain = {**bill.last.config}
    for role, (section, name) in BASES.items():
        if (facts := bill.last.base.get(role)) is not None:
            path = given.base_of(bill, role) or facts["name"]
            plain[section] = {**plain[section], name: path}
    settings = folder / "settings.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(settings, yaml.safe_dump(plain, allow_unicode=True))
    config: Config = load_stored_config(settings, Config)
    num, data = len(config.data.sources) or 1, given.data
    if len(data) != num:
        raise ValueError(f"--data names {len(data)} folders, expected {num}, in the run's order")
    sources = [
        replace(source, root=root) for source, root in zip(config.data.sources, data, strict=False)
    ]
    changed = replace(
        config.data,
        root="" if sources else data[0],
        sources=tuple(sources),
        cache_dir=str(folder / "cache"),
    )
    return replace(config, data=changed, output_dir=str(folder / "run"))


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


def _finding(part: str, details: Sequence[str], note: Sequence[str] = ()) -> Finding:
    return Finding(part, "differs" if details else "same", details or note)
