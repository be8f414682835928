"""What a run says of itself: metrics.jsonl, TensorBoard, and the end when numbers go wrong.

The host looks at the device only here, once every few steps.

What the VAE and CLIP recipes say of their losses while they train.
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
from tqdm import tqdm

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
        """Add a line for a step, in which null stands for what is no number.

        A full disk does not stop training: lines are kept and written once it takes them.
        """
        if not self._is_main:
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


class Window:
    """The steps since the last log line: their results on the device, and the time they took."""

    def __init__(
        self, accelerator: Accelerator, *, max_skipped_steps: int, num_timesteps: int
    ) -> None:
        self.accelerator, self.max_skipped_steps = accelerator, max_skipped_steps
        self.labels = bucket_labels(num_timesteps)
        self.bad_in_a_row = 0
        self.is_first = True
        self._reset()

    def _reset(self) -> None:
        self.results: list[StepResult] = []
        self.started, self.waited, self.num_samples = time.perf_counter(), 0.0, 0

    def add(self, result: StepResult, *, num_samples: int, waited: float) -> None:
        """Remember a step; num_samples: over all processes; waited: seconds for data."""
        self.results.append(result)
        self.num_samples += num_samples
        self.waited += waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out of the window: previews are no training."""
        since = time.perf_counter()
        yield
        self.started += time.perf_counter() - since

    def close(self, step: int, ids: Sequence[str], *, rate: float) -> tuple[dict[str, float], int]:
        """Return the figures of the window that ends after `step`, and its skipped updates.

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
        self._judge(ok.tolist(), step, ids)
        seconds = max(time.perf_counter() - self.started, 1e-9)
        good = ok & torch.isfinite(losses)
        figures = {
            "loss": losses[good].mean().item() if good.any() else float("nan"),
            "grad_norm": norms[good].mean().item() if good.any() else float("nan"),
            "learning_rate": rate,
            "images_per_second": self.num_samples / seconds,
            "data_wait": self.waited / seconds,
            "skipped_updates": float(skipped),
            "memory_gb": _peak_memory_gb(self.accelerator.device),
        }
        for label, total, count in zip(self.labels, *buckets.tolist(), strict=True):
            if count > 0:
                figures[f"loss/{label}"] = total / count
        self._reset()
        return figures, skipped

    def _judge(self, ok: list[bool], step: int, ids: Sequence[str]) -> None:
        first = step - len(ok) + 1
        for offset, fine in enumerate(ok):
            self.bad_in_a_row = 0 if fine else self.bad_in_a_row + 1
            if self.bad_in_a_row >= self.max_skipped_steps:
                names = [str(ids[i]) for i in self.results[offset].indices.tolist()]
                raise FloatingPointError(
                    f"the loss or a gradient was NaN or Inf in {self.bad_in_a_row} updates in a "
                    f"row, last at step {first + offset} with {', '.join(sorted(set(names))[:16])}"
                    "; the weights of before are kept in the last checkpoint. Lower "
                    "train.learning_rate, or look at these files"
                )


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
    """Leave out what a run wrote after the checkpoint that it now goes on from."""
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


class LossLog:
    """Mean losses of every few steps: a line of metrics.jsonl and a figure on the progress bar."""

    def __init__(self, folder: Path | str, *, every_steps: int, bar: tqdm) -> None:
        self.path, self.every_steps = Path(folder) / "metrics.jsonl", every_steps
        self._bar = bar
        self._seen: dict[str, list[Tensor]] = {}

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Take in the losses of a step, counted from 1: each 0-dim and detached, one named "loss".

        ValueError when a mean is no number any more.
        """
        for name, value in losses.items():
            self._seen.setdefault(name, []).append(value)
        if step % self.every_steps:
            return
        means = {name: torch.stack(values).mean().item() for name, values in self._seen.items()}
        if not all(math.isfinite(mean) for mean in means.values()):
            raise ValueError(f"the losses are {means} at step {step}; lower --learning_rate")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | means) + "\n")
        self._bar.set_postfix(loss=f"{means['loss']:.4f}")
        self._seen = {}
