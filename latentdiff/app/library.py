"""What the page offers to choose from: models, training runs, LoRAs and ControlNets, by name.

Folders are listed anew at each call, so that what a run has just written appears.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from latentdiff.models.compatibility import CONTROLNET
from latentdiff.models.model_path import BUNDLED, EXPORT, INDEX
from latentdiff.pipeline.files.adapter_file import LORA_NAMES, RUN_LORA
from latentdiff.pipeline.files.model_info import public_name

DEFAULT_MODEL = "latentdiff-mini"
NO_LORA = NO_CONTROLNET = "none"
CONTROLNET_CONFIG = "config.json"
RUN_FILES = ("config.yaml", "metrics.jsonl", "checkpoints")  # of which a run folder has one
Value = TypeVar("Value")


@dataclass(frozen=True)
class Library:
    """Models, runs, LoRAs and ControlNets of one page.

    given: what the user named, each a model's folder, a run's folder, a hub id or a name that
    ships. runs_dir: a folder of run folders. lora_dir: a folder of LoRA files. given_controlnets:
    folders, runs or hub ids.
    """

    given: Sequence[str] = ()
    runs_dir: Path | None = None
    lora_dir: Path | None = None
    given_controlnets: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise FileNotFoundError where a folder is not there."""
        for name, path in (("runs", self.runs_dir), ("lora_dir", self.lora_dir)):
            if path is not None and not path.is_dir():
                raise FileNotFoundError(f"{name}={path} is no folder here")

    def models(self) -> dict[str, str]:
        """Return each model's path or id by name: those given, then those of the runs."""
        unfinished = {str(path) for path in self.runs().values() if not _has_model(path)}
        given = [name for name in self.given if str(Path(name).expanduser()) not in unfinished]
        exported = [str(path) for path in self._listed_runs() if _has_model(path)]
        paths = [*given, *exported] or [DEFAULT_MODEL]
        return _by_name((name, name) for name in dict.fromkeys(paths))

    def runs(self) -> dict[str, Path]:
        """Return the folders of training runs by name: those given, then those of runs_dir."""
        folders = [Path(name).expanduser() for name in self.given if name not in BUNDLED]
        folders = [path.parent if path.name == EXPORT else path for path in folders]
        found = [*filter(_is_run, folders), *self._listed_runs()]
        return _by_name((str(path), path) for path in dict.fromkeys(found))

    def loras(self) -> dict[str, Path]:
        """Return the files and folders of LoRAs by name: those of lora_dir, then those of runs."""
        files: list[Path] = []
        if self.lora_dir is not None:
            files = sorted(self.lora_dir.glob("*.safetensors"))
            files += sorted(path.parent for path in self.lora_dir.glob(f"*/{LORA_NAMES[0]}"))
        found = {path.stem if path.is_file() else path.name: path for path in files}
        return found | {
            f"{run.name} (run)": run / RUN_LORA.parent
            for run in self.runs().values()
            if (run / RUN_LORA).is_file()
        }

    def controlnets(self) -> dict[str, str]:
        """Return each ControlNet's path or id by name: those given, then those of runs."""
        runs = [
            str(run)
            for run in self.runs().values()
            if (run / CONTROLNET / CONTROLNET_CONFIG).is_file()
        ]
        return _by_name((name, name) for name in dict.fromkeys([*self.given_controlnets, *runs]))

    def _listed_runs(self) -> list[Path]:
        if self.runs_dir is None:
            return []
        return [path for path in (self.runs_dir, *sorted(self.runs_dir.iterdir())) if _is_run(path)]


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in RUN_FILES)


def _has_model(run: Path) -> bool:
    return (run / EXPORT / INDEX).is_file()


def _by_name(found: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Return values by their paths' public names; those of equal names by their whole paths."""
    pairs = [(path, public_name(path), value) for path, value in found]
    names = [name for _, name, _ in pairs]
    return {name if names.count(name) == 1 else path: value for path, name, value in pairs}
