"""Trackers that a run reports to besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Each is one of Accelerate's. Figures, sheets and the settings go there, from the main process alone.
A tracker that fails is logged once and left; training continues.
"""

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import tracking
from PIL import Image

from latentdiff.atomic import write_text
from latentdiff.training.run_folder import TRACKERS

logger = logging.getLogger(__name__)
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
SAMPLES = "samples"  # the name of the sheets in a tracker


def names_of(report_to: str | Sequence[str]) -> list[str]:
    """Return the trackers that a setting report_to names, each once."""
    names = [report_to] if isinstance(report_to, str) else report_to
    return [name for name in dict.fromkeys(names) if name != "none"]


def check_trackers(report_to: str | Sequence[str], *, is_main: bool) -> None:
    """Raise ValueError for a tracker that is not installed, or that nobody has logged in to.

    In a terminal Weights & Biases asks for its key here, before heavy work.
    """
    for name in names_of(report_to):
        if find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"report_to={name} needs a package that is not installed: pip install "
                f"{PACKAGES[name]} (or latentdiff[trackers]), or leave {name} out"
            )
    if is_main and "wandb" in names_of(report_to):
        _log_in_to_wandb()


def _log_in_to_wandb() -> None:
    import wandb

    try:
        if wandb.setup().settings.mode == "online":
            wandb.login()
    except Exception as error:  # of several kinds, by version
        raise ValueError(
            f"report_to=wandb: {error}. Run wandb login once, or set WANDB_MODE=offline to keep "
            "the run in its folder until wandb sync"
        ) from error


class Trackers:
    """The trackers of a run that are open; none on other processes than the main one."""

    def __init__(
        self,
        report_to: str | Sequence[str],
        folder: Path,
        *,
        project: str,
        settings: Mapping[str, Any],
        first_step: int,
    ) -> None:
        """settings: by dotted name. first_step: steps done, after which TensorBoard drops lines.

        A run that continues in its folder continues in its trackers, by the id in trackers.json.
        """
        self._open: dict[str, Any] = {}
        plain = {name: _plain(value) for name, value in settings.items()}
        for name in names_of(report_to):
            options = _options(name, folder, first_step=first_step, settings=plain)
            place = "tensorboard" if name == "tensorboard" else project
            self._try(name, partial(self._start, name, place, options))
            if name == "tensorboard":
                self._try(name, partial(self._board_settings, plain))

    def _start(self, name: str, place: str, options: Mapping[str, Any]) -> None:
        tracker = tracking.LOGGER_TYPE_TO_CLASS[name](place, **options)
        tracker.start()
        self._open[name] = tracker

    def _board_settings(self, settings: Mapping[str, Any]) -> None:
        rows = "\n".join(f"    {name}: {value}" for name, value in settings.items())
        self._open["tensorboard"].tracker.add_text("config", rows)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Report the figures of a step, finite ones."""
        for name in list(self._open):
            self._try(name, partial(self._open[name].log, dict(figures), step=step))

    def log_sheet(self, step: int, path: Path) -> None:
        """Report a sheet of images."""
        for name in list(self._open):
            self._try(name, partial(_log_image, self._open[name], path, step=step))

    def finish(self) -> None:
        """Send what trackers still hold, and close them."""
        for name in list(self._open):
            self._try(name, self._open[name].finish)
        self._open.clear()

    def _try(self, name: str, call: Callable[[], object]) -> None:
        """Call a tracker; one that fails is left, as training matters more."""
        try:
            call()
        except Exception as error:  # each has its own, network and disk among them
            self._open.pop(name, None)
            logger.error(
                "no more of this run in %s: %s; metrics.jsonl goes on", name, error or repr(error)
            )


def _options(
    name: str, folder: Path, *, first_step: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return what a tracker of Accelerate is made with, next to its project."""
    if name == "tensorboard":
        return {"logging_dir": str(folder), "purge_step": first_step + 1}
    label, key = folder.resolve().name, _run_id(folder)
    if name == "wandb":
        return {
            "name": label,
            "id": key,
            "resume": "allow",
            "dir": str(folder),
            "config": settings,
        }
    return {"name": f"{label}-{key}", "resume": "allow", "config": settings}


def _run_id(folder: Path) -> str:
    """Return the id of a run in its trackers: made once, and kept in its folder."""
    path = folder / TRACKERS
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
    key = uuid.uuid4().hex[:8]
    write_text(path, json.dumps({"run_id": key}) + "\n")
    return key


def _log_image(tracker: Any, path: Path, *, step: int) -> None:
    with Image.open(path) as file:
        image = file.convert("RGB")
    if tracker.name == "tensorboard":
        tracker.log_images({SAMPLES: np.asarray(image)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        tracker.log_images({SAMPLES: [image]}, step=step)
    else:
        import trackio

        tracker.log({SAMPLES: trackio.Image(image)}, step=step)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
