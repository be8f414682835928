"""A run's figures: metrics.jsonl, TensorBoard, speed, and the end when numbers go wrong.

The host looks at the device only where a line is logged, once every few steps.
"""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.atomic import write_text
from latentdiff.evaluation.metrics.heldout_loss import bucket_labels
from latentdiff.training.train_step import StepResult

logger = logging.getLogger(__name__)


class MetricsLog:
    """metrics.jsonl and tensorboard/ of a run folder, written by the main process only."""

    def __init__(self, folder: Path, *, is_main: bool, first_step: int) -> None:
        self.path, self._is_main = folder / "metrics.jsonl", is_main
        self._unwritten = ""
        self._board: Any = None
        if is_main:
            from torch.utils.tensorboard import SummaryWriter

            _drop_lines_after(self.path, first_step)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a line for a step, in which null stands for a figure that is not finite.

        A full disk does not stop training: lines are kept and written once it takes them.
        """
        if not self._is_main or not figures:
            return
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        row = {"step": step, **dict.fromkeys(figures), **known}
        self._unwritten += json.dumps(row) + "\n"
        try:
            _append(self.path, self._unwritten)
            self._unwritten = ""
        except OSError as error:
            logger.error("no line for step %d in metrics.jsonl yet: %s", step, error)
        self._draw(step, known)

    def _draw(self, step: int, figures: Mapping[str, float]) -> None:
        try:
            for name, value in figures.items() if self._board is not None else ():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            logger.error("no more TensorBoard in this run: %s", error)
            self._board = None

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


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
        self.device, self.num_closed = device, 0
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
        self.started += time.perf_counter() - since

    def close(self) -> dict[str, float]:
        """Return speed and memory up to now, when the device has done the steps."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
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
    logger.info(
        "%.3g images/s: the rest takes about %d:%02d h, until %s, without previews",
        images_per_second,
        seconds // 3600,
        seconds % 3600 // 60,
        time.strftime("%d %B %H:%M", time.localtime(time.time() + seconds)),
    )


class StepResults:
    """Results of the diffusion steps since the last log line, on the device."""

    def __init__(
        self, accelerator: Accelerator, *, max_skipped_steps: int, num_timesteps: int
    ) -> None:
        self.accelerator, self.max_skipped_steps = accelerator, max_skipped_steps
        self.labels = bucket_labels(num_timesteps)
        self.skipped_in_a_row = 0
        self.results: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """Remember a step."""
        self.results.append(result)

    def close(
        self, step: int, ids: Sequence[str], *, learning_rate: float
    ) -> tuple[dict[str, float], int]:
        """Return the figures of the steps up to `step`, and the number of skipped updates.

        ids: names of the samples by index. Raises FloatingPointError when too many updates in a
        row were skipped, with the step and the files.
        """
        table = torch.stack(
            [torch.stack([r.loss, r.grad_norm, r.ok.float()]) for r in self.results]
        )  # (steps, 3)
        buckets = torch.stack(
            [torch.stack([r.bucket_losses, r.bucket_counts]) for r in self.results]
        )  # (steps, 2, NUM_BUCKETS)
        buckets = torch.where(torch.isfinite(buckets[:, :1]), buckets, 0.0).sum(0)
        losses = self.accelerator.reduce(table[:, 0].contiguous(), "sum").cpu()
        buckets = self.accelerator.reduce(buckets, "sum").cpu()
        norms, ok = table[:, 1].cpu(), table[:, 2].cpu() > 0
        skipped = int((~ok).sum())
        self._check_skipped(ok.tolist(), step, ids)
        good = ok & torch.isfinite(losses)
        figures = {
            "loss": losses[good].mean().item() if good.any() else float("nan"),
            "grad_norm": norms[good].mean().item() if good.any() else float("nan"),
            "learning_rate": learning_rate,
            "skipped_updates": float(skipped),
        }
        for label, total, count in zip(self.labels, *buckets.tolist(), strict=True):
            if count > 0:
                figures[f"loss/{label}"] = total / count
        self.results = []
        return figures, skipped

    def _check_skipped(self, ok: list[bool], step: int, ids: Sequence[str]) -> None:
        first = step - len(ok) + 1
        for offset, fine in enumerate(ok):
            self.skipped_in_a_row = 0 if fine else self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= self.max_skipped_steps:
                names = [str(ids[i]) for i in self.results[offset].indices.tolist()]
                raise FloatingPointError(
                    f"the loss or a gradient was NaN or Inf in {self.skipped_in_a_row} updates in "
                    f"a row, last at step {first + offset} with "
                    f"{', '.join(sorted(set(names))[:16])}; the weights of before are kept in the "
                    "last checkpoint. Lower train.learning_rate, or look at these files"
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
        if not all(math.isfinite(mean) for mean in means.values()):
            raise FloatingPointError(
                f"the losses are {means} at step {step}; lower --learning_rate"
            )
        self._seen = {}
        return means


def _peak_memory_gb(device: torch.device) -> float:
    """Return the most memory used so far: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _append(path: Path, text: str) -> None:
    """Add text to a file, all of it or none: what a full disk cuts short is taken back."""
    content = text.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(content) < len(content):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines that a run wrote after the checkpoint that it now resumes from."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short
    write_text(path, "".join(f"{line}\n" for line in kept))
