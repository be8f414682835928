"""Train a model again from its bill of materials, and compare the weights.

On the same processor, threads and versions they are equal bit for bit; elsewhere sums are rounded
in another order, and training enlarges that.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open

from latentdiff.audit.stored_bill import CONFIG, StoredBill, read_bills
from latentdiff.audit.verify import Answer, Finding, Given, config_of
from latentdiff.config.io import load_stored_config
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig
from latentdiff.models.model_path import BUNDLED, resolve_model
from latentdiff.pipeline.files.model_info import CONTENT_NAME
from latentdiff.training.bill.bill import HEADER, Bill, canonical, is_weights
from latentdiff.training.bill.contents import read_header
from latentdiff.training.bill.folder_runs import KINDS, folder_config_of
from latentdiff.training.bill.materials import HIDDEN, TEXTS, public_config
from latentdiff.training.clip.train_clip import train_clip
from latentdiff.training.text_to_image.train_t2i import train
from latentdiff.training.vae.train_vae import train_vae

RERUN_BOUND = 0.05  # of what was learned, where equal bits cannot be expected
NOT_COMPARED = ("latentdiff.json", CONTENT_NAME)  # measurements, and names of folders
LORA_SETTINGS = "lora_adapter_metadata"


class RerunStoppedError(RuntimeError):
    """A rerun that did not come to its end; status: its exit code."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the rerun was stopped (exit code {status})")
        self.status = status


def rerun(model: str, given: Given, *, bound: float = RERUN_BOUND) -> list[Finding]:
    """Train again with the bill's settings, and compare each export with the model's.

    given: as of `verify`; what the bill names as a base must be given, but for a model that ships.
    bound: of the distance of the weights from the model's over what was learned, which counts where
    processor, threads, code or versions are others. The rerun lives in a temporary folder, reports
    to no tracker and downloads nothing. Raises ValueError where a base is missing or a bill's run
    was resumed with something changed, RerunStoppedError after a signal, and what `train` raises.
    """
    stored = read_bills(model)
    bill = stored[0].bill
    _check_repeatable(bill, given)
    with TemporaryDirectory(prefix="latentdiff-rerun-") as scratch:
        run, name = Path(scratch) / "run", "rerun" if len(stored) == 1 else "{} rerun"
        with _without_log_of_files():
            status, base = _train(bill, given, run, before=Path(model).expanduser())
        if status != 0:
            raise RerunStoppedError(status)
        return [
            replace(
                _compare(one, run / one.bill.artifact, base=base, bound=bound),
                part=name.format(one.bill.artifact),
            )
            for one in stored
        ]


def _train(bill: Bill, given: Given, run: Path, *, before: Path) -> tuple[int, Path | None]:
    """Train as a bill says into a run's folder; return the exit status, and the base if any.

    before: the first run's folder, if that was given.
    """
    kind = KINDS.get(bill.artifact)
    if kind is None:
        config = _with_texts(_settings(bill, given, run.parent), bill, before / CONFIG)
        pretrained = config.model.pretrained
        return train(config), Path(resolve_model(pretrained)) if pretrained else None
    bases = {
        role: given.base_of(bill, role) or facts["name"] for role, facts in bill.last.base.items()
    }
    own = folder_config_of(kind, bill.last.config, data=given.data, bases=bases, folder=run)
    return (train_vae(own) if isinstance(own, VaeConfig) else train_clip(own)), None


def _check_repeatable(bill: Bill, given: Given) -> None:
    if bill.made_from:
        raise ValueError(
            f"--rerun trains again, and this was made of an export, {bill.made_from['artifact']} "
            f"of root {bill.made_from['root']}; rerun that one"
        )
    check_one_run(bill)
    for role, facts in bill.last.base.items():
        if not given.base_of(bill, role) and facts["name"] not in BUNDLED:
            raise ValueError(f"--rerun needs {role} {facts['name']}; give --base {role}=PATH")


def check_one_run(bill: Bill) -> None:
    """Raise ValueError for a run that was resumed with something changed."""
    for one in bill.segments:
        if (one.config, one.base, one.data) != (bill.last.config, bill.last.base, bill.last.data):
            raise ValueError(
                f"the run was resumed at step {bill.last.from_step} with other settings, data or "
                "base, so no rerun from the start gives its weights; verify it without --rerun"
            )


def _settings(bill: Bill, given: Given, scratch: Path) -> Config:
    config = config_of(bill, given, folder=scratch)
    return replace(
        config,
        preview=replace(config.preview, every_steps=0, num_steps=1, num_nearest=0),
        train=replace(config.train, report_to="none"),
        finetune=replace(config.finetune, class_images_dir=given.class_images),
    )


def _with_texts(config: Config, bill: Bill, path: Path) -> Config:
    """Return settings with the texts of which a bill has hashes, from the run's config.yaml."""
    if HIDDEN not in canonical(bill.last.config).decode():
        return config
    own = load_stored_config(path, Config) if path.is_file() else None
    if own is None or public_config(own) != bill.last.config:
        raise ValueError(
            "the bill has hashes in place of prompts (data.bill_of_materials=hashes): --rerun "
            "needs the run's folder, whose config.yaml has them"
        )
    texts = {
        section: {name: getattr(getattr(own, section), name) for name in names}
        for section, names in TEXTS.items()
    }
    sources = [
        replace(now, **{name: getattr(one, name) for name in TEXTS["data"] if hasattr(one, name)})
        for now, one in zip(config.data.sources, own.data.sources, strict=True)
    ]
    data = replace(config.data, sources=tuple(sources), **texts["data"])
    return replace(config, data=data, finetune=replace(config.finetune, **texts["finetune"]))


@contextmanager
def _without_log_of_files() -> Iterator[None]:
    """Keep lines out of the log that name what is deleted a moment later."""
    log = logging.getLogger("latentdiff.training.loop")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def _compare(stored: StoredBill, place: Path, *, base: Path | None, bound: float) -> Finding:
    (again, *_) = read_bills(str(place))
    known, found = stored.found(), again.found()
    compared = [*known] if stored.is_lone_file else sorted({*known, *found})
    others = [
        name
        for name in compared
        if known.get(name) != found.get(name)
        and not name.endswith(HEADER)
        and name not in NOT_COMPARED
    ]
    weights = [name for name in others if is_weights(name)]
    lines = [f"changed  {name}" for name in others if name not in weights]
    files = {name: _file(stored, name) for name in compared if is_weights(name)}
    lines += [
        f"changed  {name}: {LORA_SETTINGS}"
        for name, path in files.items()
        if name in found and _lora_settings(path) != _lora_settings(_file(again, name))
    ]
    if lines or not weights:
        return Finding("rerun", "differs" if lines else "same", lines or ["equal bit for bit"])
    distance = learned_distance(
        {name: (path, _file(again, name)) for name, path in files.items()}, base=base
    )
    circumstances = _circumstances(stored.bill, again.bill)
    text = f"the weights' distance is {distance:.2g} of what was learned"
    if not circumstances:
        return Finding("rerun", "differs", [f"{text}, expected equal bits on this machine"])
    answer: Answer = "same" if distance <= bound else "differs"
    allowed = f"allowed {bound:g} with another {', '.join(circumstances)}"
    return Finding("rerun", answer, [f"{text}, {allowed}"])


def _file(stored: StoredBill, name: str) -> Path:
    return stored.place if stored.is_lone_file else stored.place / name


def _lora_settings(path: Path) -> str:
    return str(read_header(path)[1].get("__metadata__", {}).get(LORA_SETTINGS, ""))


def _circumstances(before: Bill, now: Bill) -> list[str]:
    """Return what equal bits depend on and was another in any part of the first run."""
    code, found = now.last.code, list[str]()
    for one in before.segments:
        machine = one.code.get("machine", {})
        found += [n for n in ("source", "python", "libraries") if code[n] != one.code.get(n)]
        found += [
            name.replace("num_", "number of ").replace("_", " ")
            for name, value in code["machine"].items()
            if machine.get(name) != value
        ]
    if code["machine"]["device"] != "cpu":
        found.append("order of sums on an accelerator")
    return list(dict.fromkeys(found))


def learned_distance(files: dict[str, tuple[Path, Path]], *, base: Path | None = None) -> float:
    """Return the Euclidean distance of two models' weights over that of the first from the base.

    files: of both by name; base: a model's folder, whose tensors of the same file, name and shape
    count, 0 elsewhere. inf where tensors have other names or shapes, or are not finite.
    """
    apart = learned = 0.0
    for name, (before, now) in files.items():
        if not now.is_file():
            return math.inf
        start = base / name if base is not None and (base / name).is_file() else None
        for first, second, origin in _tensors(before, now, start):
            if second is None or first.shape != second.shape:
                return math.inf
            apart += float((first - second).square().sum())
            learned += float((first - origin).square().sum())
    if not math.isfinite(apart + learned):
        return math.inf
    return math.sqrt(apart / learned) if learned else (math.inf if apart else 0.0)


def _tensors(before: Path, now: Path, base: Path | None) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each tensor of the first file, and those of the second, or None, and the base, or 0."""
    with safe_open(before, "pt") as one, safe_open(now, "pt") as two:
        names = {*one.keys(), *two.keys()}
        for name in sorted(names):
            if name not in one.keys() or name not in two.keys():  # noqa: SIM118 - no dict
                yield 0, None, 0
                continue
            first = one.get_tensor(name).double()
            yield first, two.get_tensor(name).double(), _origin(base, name, first.shape)


def _origin(base: Path | None, name: str, shape: Any) -> Any:
    if base is None:
        return 0.0
    with safe_open(base, "pt") as file:
        found = file.get_tensor(name).double() if name in file.keys() else None  # noqa: SIM118
    return found if found is not None and found.shape == shape else 0.0
