"""Find the bills of materials of a run, an exported folder or a file, and every root they state."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline.files.model_card import bill_root_in
from latentdiff.pipeline.files.model_info import BILL_KEY, BILL_NAME
from latentdiff.training.bill.bill import ARTIFACTS, OF_CLIP, OF_VAE, WEIGHTS, Bill
from latentdiff.training.bill.contents import bill_in_header, bill_of_folder, contents

CONFIG = "config.yaml"  # of a run


@dataclass(frozen=True)
class StoredBill:
    """A bill as it lies with a model, and the roots that are stated of it, which may contradict it.

    place: the model's folder or file; claims: (where, root) wherever a root is stated; apart: names
    in the folder that have a bill of their own.
    """

    place: Path
    bill: Bill
    claims: Sequence[tuple[str, str]] = field(default_factory=tuple)
    apart: Sequence[str] = field(default_factory=tuple)

    @property
    def is_lone_file(self) -> bool:
        """Whether it is a file, of a folder or not, that is looked at without others."""
        return self.place.is_file()

    def found(self) -> dict[str, str]:
        """Return the `contents` of the place, which should be those that the bill states.

        A lone file may have another name, and stands under the one by which the bill knows it.
        """
        found = contents(self.place)
        if not self.is_lone_file:
            return {n: one for n, one in found.items() if n.partition("#")[0] not in self.apart}
        own = found[self.place.name]
        name = next((name for name, one in self.bill.files.items() if one == own), None)
        name = name or next(filter(lambda one: one.endswith(WEIGHTS), self.bill.files), "")
        return {n.replace(self.place.name, name, 1): one for n, one in found.items()}


def read_bills(model: str) -> list[StoredBill]:
    """Return the bill of a model's folder or file, or those of all that a run exported.

    Raises FileNotFoundError where there is nothing, ValueError where an export has no bill.
    """
    place = Path(model).expanduser()
    place = place if place.exists() else Path(resolve_model(model))
    if not place.exists():
        raise FileNotFoundError(f"{model} does not exist, expected a model's folder or file")
    exports, has_config = [place], (place / CONFIG).is_file()
    is_run = has_config or any((place / name).is_dir() for name in ARTIFACTS)
    if is_run and not (place / BILL_NAME).is_file():
        others = [name for name in (*OF_VAE, *OF_CLIP) if has_config and (place / name).is_dir()]
        if others in ([], ["tokenizer"]):  # which text-to-image training from scratch writes too
            others = [name for name in ARTIFACTS if (place / name).exists()]
        exports = [place / name for name in others]
    found = [_of_file(one) if one.is_file() else _of_folder(one) for one in exports]
    if missing := [str(one) for one, bills in zip(exports, found, strict=True) if not bills]:
        raise ValueError(
            f"{', '.join(missing)} has no bill of materials: expected {BILL_NAME} in a folder, or "
            f"the entry {BILL_KEY} in a safetensors file; training writes both unless "
            "data.bill_of_materials=none"
        )
    if not found:
        raise ValueError(f"{model} has exported nothing yet; run the same command to its end")
    return [bill for bills in found for bill in bills]


def _of_folder(place: Path) -> list[StoredBill]:
    """Return the bill of a folder, then those of files in it that have their own."""
    headers = [one for path in sorted(place.rglob(f"*{WEIGHTS}")) for one in _of_file(path)]
    alone = [one for one in headers if one.place == place / one.bill.artifact]
    others = [one for one in headers if one not in alone]
    claims = [claim for one in others for claim in one.claims]
    if sidecar := bill_of_folder(place):
        bill = sidecar[0]
        claims.insert(0, (str(place / BILL_NAME), sidecar[1]))
    elif others:
        bill = others[0].bill
    else:
        return alone
    card = place / "README.md"
    if card.is_file() and (root := bill_root_in(card.read_text(encoding="utf-8"))):
        claims.append((str(card), root))
    return [StoredBill(place, bill, claims, [one.place.name for one in alone]), *alone]


def _of_file(path: Path) -> list[StoredBill]:
    found = bill_in_header(path)
    return [StoredBill(path, found[0], [(str(path), found[1])])] if found else []
