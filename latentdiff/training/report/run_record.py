"""What a run folder says of its run: settings, metrics, plan, log and sheets, finished or not."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import flat, load_stored_config
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig
from latentdiff.config.yaml_file import read_yaml
from latentdiff.training.metrics_file import read_rows
from latentdiff.training.run_folder import PLAN, exports_of
from latentdiff.training.run_log import LogEntry, read_log

KINDS: dict[str, tuple[str, Any]] = {  # by a setting that only this kind has
    "train": ("text-to-image", Config),
    "latent_channels": ("VAE", VaeConfig),
    "embed_dim": ("CLIP", ClipConfig),
}
AUDIT = "audit"  # folder of a run that audits write into
SHEET = re.compile(r"step-(\d{9,})\.png")


class Series(NamedTuple):
    """A figure over the steps of its log lines, finite values only."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells of it. plan: {} where a run has none (VAE, CLIP, earlier versions).

    rows: the lines of metrics.jsonl. settings, defaults: by dotted name. sheets: by step.
    """

    name: str
    folder: Path
    kind: str
    settings: dict[str, Any]
    defaults: dict[str, Any]
    rows: list[dict[str, Any]]
    plan: dict[str, Any]
    log: list[LogEntry]
    sheets: dict[int, Path]

    def series(self, name: str) -> Series:
        """Return a figure's finite values and their steps."""
        found = [(row["step"], row[name]) for row in self.rows if _is_finite(row.get(name))]
        return Series([float(step) for step, _ in found], [float(value) for _, value in found])

    def setting(self, name: str) -> Any:
        """Return a setting by its name in text-to-image training, or without its section."""
        return self.settings.get(name, self.settings.get(name.rpartition(".")[2]))

    @cached_property
    def last_step(self) -> int:
        """The last step that has a line of metrics."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @cached_property
    def max_steps(self) -> int:
        """The steps that the run is to have."""
        return int(self.setting("train.max_steps"))

    @cached_property
    def images_per_step(self) -> float:
        """Images of a mean step; the last of an epoch may have fewer than batch_size."""
        known = self.plan.get("steps", {}).get("images_per_step")
        return float(known or self.setting("train.batch_size"))

    @cached_property
    def training_seconds(self) -> float:
        """Time in steps alone: previews, evaluation and set-up are not in it."""
        steps, speeds = self.series("images_per_second")
        counts = [now - before for before, now in zip([0.0, *steps], steps, strict=False)]
        return sum(
            self.images_per_step * num / speed
            for num, speed in zip(counts, speeds, strict=True)
            if speed > 0
        )

    @cached_property
    def wall_seconds(self) -> float | None:
        """Time from the first to the last line of each session's log; None without a log."""
        sessions: dict[int, list[LogEntry]] = {}
        for entry in self.log:
            sessions.setdefault(entry.session, []).append(entry)
        spans = [(lines[-1].time - lines[0].time).total_seconds() for lines in sessions.values()]
        return sum(spans) if spans else None

    @cached_property
    def status(self) -> str:
        """Whether the run is running, finished, failed or stopped."""
        lock = self.folder / ".lock"
        if lock.is_file() and lock.stat().st_size:  # emptied when a run ends, however it ends well
            return "running, or ended by a kill"
        if self.log and self.log[-1].level == "ERROR":
            return "failed"
        if self.last_step >= self.max_steps and exports_of(self.folder):
            return "finished"
        if self.setting("train.stop") == "auto" and self._said_stop and exports_of(self.folder):
            return f"finished by its verdict after step {self.last_step:,} of {self.max_steps:,}"
        return f"stopped after step {self.last_step:,} of {self.max_steps:,}"

    @property
    def _said_stop(self) -> bool:
        """Whether the last verdict was to stop where the run ended."""
        steps = self.series("stop_step").values
        return bool(steps) and steps[-1] == self.last_step


def read_runs(paths: list[str]) -> list[RunRecord]:
    """Read run folders; their names tell them apart. ValueError as `read_run`."""
    folders = [run_folder_of(Path(path).expanduser()) for path in paths]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice, expected different runs")
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def run_folder_of(path: Path) -> Path:
    """Return the run folder at a path, or that of the model folder at it (RUN/pipeline)."""
    for folder in (path, path.parent):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return folder
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist, expected the folder of a run")
    raise ValueError(
        f"{path} is no run folder: it has no config.yaml and metrics.jsonl, which training writes "
        "into its output_dir"
    )


def read_run(folder: Path, name: str) -> RunRecord:
    """Read a run folder. ValueError for settings that this version cannot read."""
    path = folder / "config.yaml"
    keys = yaml.safe_load(read_yaml(path))
    found = [kind for key, kind in KINDS.items() if key in keys]
    if not found:
        raise ValueError(f"{path} is of no recipe that is known: {', '.join(KINDS)} are absent")
    kind, config = found[0]
    sheets = {
        int(match[1]): file
        for file in sorted((folder / "samples").glob("step-*.png"))
        if (match := SHEET.fullmatch(file.name))
    }
    plan = folder / PLAN
    return RunRecord(
        name=name,
        folder=folder,
        kind=kind,
        settings=flat(load_stored_config(path, config)),
        defaults=flat(config()),
        rows=list(read_rows(folder)),
        plan=json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else {},
        log=read_log(folder),
        sheets=sheets,
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
