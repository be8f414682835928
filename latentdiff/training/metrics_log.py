"""The log lines of a run: metrics.jsonl, trackers, speed, and the end when numbers go wrong.

Loss, gradient norm and learning rate come from the recipe, in text-to-image from `StepResults` of
text_to_image/step_results.py; loop.py decides when a line is due, and shows it on the progress bar.

The host looks at the device only where a line is logged, once every few steps.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from latentdiff.training.checkpoint import Parts
from latentdiff.training.metrics_file import METRICS, append_text, drop_lines_after
from latentdiff.training.progress import duration_text
from latentdiff.training.trackers import Trackers

logger = logging.getLogger(__name__)
WINDOW = "window"  # part of a checkpoint: the steps since the last log line


class MetricsLog:
    """metrics.jsonl of a run folder and its trackers, written by the main process only."""

    def __init__(
        self, folder: Path, *, is_main: bool, first_step: int, trackers: Trackers | None = None
    ) -> None:
        self.folder, self.path = folder, folder / METRICS
        self._is_main, self._unwritten, self._trackers = is_main, "", trackers
        if is_main:
            drop_lines_after(self.path, first_step)

    def write(self, step: int, figures: Mapping[str, float | str]) -> None:
        """Add a line for a step, in which null stands for a figure that is not finite.

        Trackers get the numbers alone. A full disk does not stop training: lines are kept and
        written once it takes them.
        """
        if not self._is_main or not figures:
            return
        words = {name: value for name, value in figures.items() if isinstance(value, str)}
        known = {
            name: value
            for name, value in figures.items()
            if not isinstance(value, str) and math.isfinite(value)
        }
        row = {"step": step, **dict.fromkeys(figures), **known, **words}
        self._unwritten += json.dumps(row) + "\n"
        try:
            append_text(self.path, self._unwritten)
            self._unwritten = ""
        except OSError as error:
            logger.error("no line for step %d in metrics.jsonl yet: %s", step, error)
        if self._trackers is not None:
            self._trackers.log(step, known)

    def write_sheet(self, step: int, path: Path) -> None:
        """Give trackers a sheet that was just written."""
        if self._trackers is not None:
            self._trackers.log_sheet(step, path)

    def close(self) -> None:
        """Flush what trackers still hold."""
        if self._trackers is not None:
            self._trackers.finish()


class TimedIterator(Iterator[Any]):
    """An iterator that knows how long it was waited for, in seconds."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self._waited = batches, 0.0

    def __next__(self) -> Any:
        started = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - started
        return batch

    def take(self) -> float:
        """Return the seconds since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited


class Stopwatch:
    """The time that the steps since the last log line took."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.num_closed, self.total_paused = device, 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self.started, self.waited, self.num_images = time.perf_counter(), 0.0, 0

    def add(self, num_images: int, *, waited: float) -> None:
        """Count a step; num_images: over all processes; waited: seconds for data."""
        self.num_images += num_images
        self.waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside the block: previews are no training."""
        since = time.perf_counter()
        yield
        seconds = time.perf_counter() - since
        self.started += seconds
        self.total_paused += seconds

    def seconds(self) -> float:
        """Return the time since the last log line, without pauses."""
        return max(time.perf_counter() - self.started, 1e-9)

    def close(self) -> dict[str, float]:
        """Return speed and memory up to now, when the device has done the steps."""
        seconds = self.seconds()
        figures = {
            "images_per_second": self.num_images / seconds,
            "data_wait": self.waited / seconds,
            "memory_gb": _peak_memory_gb(self.device),
        }
        self.num_closed += 1
        self._reset()
        return figures


def log_throughput(images_per_second: float, *, num_images: int) -> None:
    """Log the throughput, and the time that the remaining num_images will take."""
    if not images_per_second > 0:
        return
    seconds = num_images / images_per_second
    form = "%H:%M" if seconds < 12 * 3600 else "%d %B %H:%M"
    logger.info(
        "%.3g images/s: the rest takes about %s, until %s, without previews",
        images_per_second,
        duration_text(seconds),
        time.strftime(form, time.localtime(time.time() + seconds)),
    )


class MeanLosses:
    """Losses of the steps since the last log line, by name, on the device."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Take in the losses of a step: each 0-dim and detached."""
        for name, value in losses.items():
            self._seen.setdefault(name, []).append(value)

    def close(self, step: int) -> dict[str, float]:
        """Return their means; FloatingPointError when one is not finite after `step` steps."""
        means = {name: torch.stack(values).mean().item() for name, values in self._seen.items()}
        _check_finite(means, f"at step {step}")
        self._seen = {}
        return means

    def tensors(self) -> Parts:
        """Return what a checkpoint holds of them: nothing at a log line.

        So a resumed run logs the means of the run that never stopped. FloatingPointError when one
        is not finite: the state after it is not to be saved.
        """
        if not self._seen:
            return {}
        stacked = {name: torch.stack(values) for name, values in self._seen.items()}
        _check_finite({name: values.mean().item() for name, values in stacked.items()}, "so far")
        return {WINDOW: stacked}

    def load(self, tensors: Parts, device: torch.device) -> None:
        """Take them back; earlier versions saved none."""
        self._seen = {
            name: list(values.to(device)) for name, values in tensors.get(WINDOW, {}).items()
        }


def _check_finite(means: Mapping[str, float], when: str) -> None:
    if not all(math.isfinite(mean) for mean in means.values()):
        raise FloatingPointError(f"the losses are {means} {when}; lower --learning_rate")


def _peak_memory_gb(device: torch.device) -> float:
    """Return the most memory used so far: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float(psutil.Process().memory_info().peak_wset) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
