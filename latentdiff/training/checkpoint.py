"""Checkpoints that a kill, a full disk or a flipped bit cannot spoil: save, validate, find, prune.

A folder named step-%09d was written whole (atomic.py). manifest.json names every file with its size
and sha256, so that damage is found before the file is used. Only safetensors and JSON; nothing is
unpickled. Each recipe decides what a checkpoint holds (`tensors` and `state` of recipe.py).

    checkpoints/step-000012000/{<part>.safetensors ..., state.json, config.yaml, manifest.json}

A run that is resumed from an older checkpoint by its path begins a branch. The manifest has the
checkpoint's lineage: the step and the seal of each checkpoint where a branch began on the way.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.atomic import atomic_folder, file_hash, remove_folder, remove_leftovers

FORMAT = 1
STATE, MANIFEST, CONFIG = "state.json", "manifest.json", "config.yaml"
FOLDER = re.compile(r"step-(?P<step>\d{9,})(?P<replaced>\.replaced)?")
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

Parts = Mapping[str, Mapping[str, Tensor]]
Lineage = tuple[tuple[int, str], ...]  # step and seal of each checkpoint where a branch began


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors by part and name, and the JSON state."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    config_hash: str
    world_size: int


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tensors: Parts,
    state: Mapping[str, Any],
    config_hash: str,
    world_size: int,
    config: str | None = None,
    lineage: Lineage = (),
) -> Path:
    """Write root/step-%09d, one safetensors file per key of `tensors`, and return its path.

    config: the run's settings as YAML. For one process only. A folder of the same step is replaced.
    OSError when the disk fails or is full: what was there before stays as it was. ValueError when
    `state` is no plain JSON.
    """
    _check_parts(tensors)
    state_json = _to_json(state)
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:09d}"
    remove_leftovers(root)
    with atomic_folder(final) as folder:
        for part, named in tensors.items():
            _save_tensors(named, folder / f"{part}.safetensors")
        (folder / STATE).write_text(state_json, encoding="utf-8")
        if config is not None:
            (folder / CONFIG).write_text(config, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "step": step,
            "config_hash": config_hash,
            "world_size": world_size,
            "lineage": lineage,
            "files": {path.name: file_hash(path) for path in sorted(folder.iterdir())},
        }
        sealed = {**manifest, "seal": _hash(manifest)}
        (folder / MANIFEST).write_text(_to_json(sealed), encoding="utf-8")
    return final


def load_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint onto `device`, after validating it. Raises CheckpointError."""
    manifest = validate_checkpoint(path)
    parts = [name for name in manifest["files"] if name.endswith(".safetensors")]
    try:
        tensors = {
            name.removesuffix(".safetensors"): load_file(path / name, device=str(device))
            for name in parts
        }
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    return Checkpoint(
        path=path,
        step=manifest["step"],
        state=state,
        tensors=tensors,
        config_hash=manifest["config_hash"],
        world_size=manifest["world_size"],
    )


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole (None: there is none), and why newer ones are not.

    Other names in the folder are ignored.
    """
    skipped: list[str] = []
    for path in reversed(checkpoint_folders(root)):
        try:
            validate_checkpoint(path)
            return path, skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint, of which only the manifest is read."""
    return int(_read_manifest(path)["step"])


def checkpoint_state(path: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint, of which no tensors are read. CheckpointError."""
    _read_manifest(path)
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {STATE}: {error}") from error
    return state


def read_lineage(path: Path) -> Lineage:
    """Return the lineage of a checkpoint, of which only the manifest is read."""
    return _lineage(_read_manifest(path))


def branch_at(path: Path) -> Lineage:
    """Return the lineage of a branch that begins at a checkpoint."""
    manifest = _read_manifest(path)
    return (*_lineage(manifest), (manifest["step"], _hash(manifest)))


def is_part_of(path: Path, lineage: Lineage) -> bool:
    """Return whether a checkpoint is of the run with this lineage, or of one that it began from.

    What has no readable manifest is not.
    """
    try:
        manifest = _read_manifest(path)
    except CheckpointError:
        return False
    own = _lineage(manifest)
    is_older = len(own) < len(lineage) and manifest["step"] <= lineage[len(own)][0]
    return own == lineage[: len(own)] and (is_older or len(own) == len(lineage))


def validate_checkpoint(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose every byte is as it was saved.

    Raises CheckpointError that names the first file that is missing, short or changed.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        _check_size(path / name, expected["bytes"])
        try:
            found = file_hash(path / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: cannot read {name}: {error}") from error
        if found["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"checkpoint {path}: {name} was changed after it was saved (its sha256 differs); "
                "use another checkpoint"
            )
    return manifest


def prune_checkpoints(
    root: Path,
    *,
    keep_last: int,
    keep_every_steps: int | None = None,
    losses: Mapping[int, float] | None = None,
    lineage: Lineage = (),
) -> list[Path]:
    """Delete checkpoints and return their former paths. Call it after a save, never before.

    Kept: the last `keep_last`, every step that keep_every_steps divides, the checkpoint where the
    branch of `lineage` began, and of the existing ones that with the minimum of `losses`, by step.
    A broken one, or one of another branch, is neither counted nor touched.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}: expected 1 checkpoint or more")
    steps = {
        path: step
        for path in checkpoint_folders(root)
        if is_part_of(path, lineage) and (step := _whole_step(path)) is not None
    }
    best = best_step({step: losses[step] for step in steps.values() if losses and step in losses})
    kept = {best, *(step for step, _ in lineage[-1:])}
    removable = [
        path
        for path in list(steps)[:-keep_last]
        if steps[path] not in kept
        and not (keep_every_steps and steps[path] % keep_every_steps == 0)
    ]
    for path in removable:
        remove_folder(path)
    return removable


def best_step(losses: Mapping[int, float]) -> int | None:
    """Return the step with the minimum loss, the first of equal ones; None where there is none."""
    return min(losses, key=lambda step: (losses[step], step), default=None)


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of a config as plain JSON values, whatever the order of its keys."""
    return _hash(config)


def snapshot(tensors: Parts) -> dict[str, dict[str, Tensor]]:
    """Copy tensors to the CPU, so that training may continue while they are being saved."""
    return {
        part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
        for part, named in tensors.items()
    }


class BackgroundSaver:
    """Save next to training: one thread, one save at a time, and each failure is kept for `check`.

    Give `submit` a function over a `snapshot`: training changes the tensors themselves.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def submit(self, save: Callable[[], object]) -> None:
        """Start a save; waits for the one before it."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint")
        self._thread.start()

    def check(self) -> Exception | None:
        """Return, once, the error of the last failed save, so that the loop can log it."""
        failure, self._failure = self._failure, None
        return failure

    @property
    def busy(self) -> bool:
        """True while a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when no save is under way; failures are left for `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, save: Callable[[], object]) -> None:
        try:
            save()
        except Exception as error:  # any kind: training continues and `check` reports it
            self._failure = error


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first; of one step, the one being replaced first.

    Whole or not; other names in the folder are ignored.
    """
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if (match := FOLDER.fullmatch(path.name)) and path.is_dir():
            found.append((int(match["step"]), match["replaced"] is None, path))
    return [path for *_, path in sorted(found)]


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and check that it is whole, ours, and of the step that the folder names."""
    if not path.is_dir():
        what = "is a file, expected a checkpoint folder" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} is missing; the folder is no whole checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {MANIFEST}: {error}") from error
    body = dict(manifest) if isinstance(manifest, dict) else {}
    if body.pop("seal", None) != _hash(body):
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} was changed after it was saved")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {body['format']}, expected {FORMAT}: it was saved by "
            "another version of latentdiff"
        )
    named = FOLDER.fullmatch(path.name)
    if named and int(named["step"]) != body["step"]:
        raise CheckpointError(
            f"checkpoint {path} was renamed: it holds step {body['step']}; give it back its name"
        )
    return body


def _lineage(manifest: Mapping[str, Any]) -> Lineage:
    """Return a manifest's lineage; those of earlier versions have none."""
    return tuple((int(step), str(seal)) for step, seal in manifest.get("lineage", ()))


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is missing")
    size = path.stat().st_size
    if size != expected:
        what = "empty" if size == 0 else "truncated" if size < expected else "too long"
        raise CheckpointError(
            f"checkpoint {path.parent}: {path.name} is {what}: {size:,} bytes, expected "
            f"{expected:,}"
        )


def _whole_step(path: Path) -> int | None:
    """Return the step of a checkpoint whose manifest and file sizes are right, else None."""
    try:
        manifest = _read_manifest(path)
        for name, expected in manifest["files"].items():
            _check_size(path / name, expected["bytes"])
    except CheckpointError:
        return None
    return int(manifest["step"])


def _check_parts(tensors: Parts) -> None:
    if bad := [part for part in tensors if not PART.fullmatch(part)]:
        raise ValueError(f"cannot name a file after the part {bad[0]!r}: use letters, digits, _ -")


def _to_json(value: object) -> str:
    """Write plain JSON; ValueError for what would come back as something else."""
    _check_json(value, "state")
    return json.dumps(value, indent=1, allow_nan=False)


def _check_json(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: JSON keys are strings")
            _check_json(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_json(inner, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(
            f"{where} is a {type(value).__name__}, expected a plain JSON value; tensors belong "
            "among the tensors"
        )


def _hash(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _save_tensors(named: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. OSError when the disk does not take it."""
    try:
        save_file(dict(_own_memory(named.items())), path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _own_memory(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield contiguous CPU tensors, no two in the same memory, as safetensors wants them."""
    seen = set()
    for name, tensor in named:
        flat = tensor.detach().cpu().contiguous()
        address = flat.untyped_storage().data_ptr()
        yield name, flat.clone() if address in seen else flat
        seen.add(address)
