"""The folder power_ema/ of a run: averages of power-function form as they were now and then.

    power_ema/step-000001000-width-0.05.safetensors

One file for each step and width, in float32: rebuilding a width adds snapshots up with weights of
both signs whose magnitudes sum to about 2, for narrow widths to 10 and more, and would enlarge half
precision's rounding, which is as large as what a fine-tune at a low rate moves the weights by.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.training.power_ema import Snapshot, sigma_rel_of
from latentdiff.whole_file import TEMPORARY, whole_file

FOLDER = "power_ema"
KEY = "power_ema"  # one, as safetensors writes several in no fixed order
NAME = re.compile(r"step-(?P<step>\d{9,})-width-[0-9.e+-]+\.safetensors")


def snapshot_path(run_folder: Path, step: int, width: float) -> Path:
    """Return where the average of a width goes after optimiser step `step`."""
    return run_folder / FOLDER / f"step-{step:09d}-width-{width:g}.safetensors"


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot as one safetensors file, whole or not at all. OSError when it cannot be."""
    facts = {
        "step": snapshot.step,
        "gamma": snapshot.gamma,
        "sigma_rel": round(sigma_rel_of(snapshot.gamma), 6),
    }
    tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={KEY: json.dumps(facts)})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_snapshot(path: Path) -> Snapshot:
    """Open what `save_snapshot` wrote; a tensor is read when it is asked for.

    ValueError when it is something else or damaged.
    """
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error
    metadata = file.metadata() or {}
    if KEY not in metadata:
        raise ValueError(f"{path} is no snapshot of a power-function average")
    facts = json.loads(metadata[KEY])
    return Snapshot(facts["step"], facts["gamma"], _Tensors(file))


def read_snapshots(run_folder: Path) -> list[Snapshot]:
    """Open all snapshots of a run, by step and width. FileNotFoundError when it has none."""
    paths = sorted(path for path, _ in _stored(run_folder))
    if not paths:
        raise FileNotFoundError(
            f"{run_folder / FOLDER} holds no snapshot: the run needs train.power_ema, for example "
            "--train.power_ema='[0.05, 0.1]', and train.power_ema_every_steps"
        )
    return [read_snapshot(path) for path in paths]


def drop_snapshots_after(run_folder: Path, step: int) -> None:
    """Delete what a run stored after the step that it now goes on from, and what it left half."""
    for path, at in list(_stored(run_folder)):
        if at > step:
            path.unlink()
    for path in (run_folder / FOLDER).glob(TEMPORARY):
        path.unlink()


def _stored(run_folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the snapshots' files and steps; other names in the folder are ignored."""
    folder = run_folder / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            yield path, int(match["step"])


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open safetensors file by name, each read at every access."""

    def __init__(self, file: safe_open) -> None:
        self._file, self._names = file, dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
