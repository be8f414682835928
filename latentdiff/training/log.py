"""What a run says of itself: metrics.jsonl, TensorBoard, and the end when numbers go wrong.

The host looks at the device only here, once every few steps.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from latentdiff.training.engine import NUM_BUCKETS, StepResult


class MetricsLog:
    """metrics.jsonl and tensorboard/ of a run folder, written by the main process only."""

    def __init__(self, folder: Path, *, is_main: bool, first_step: int) -> None:
        self.path, self._is_main = folder / "metrics.jsonl", is_main
        self._board = None
        if is_main:
            from torch.utils.tensorboard import SummaryWriter

            _drop_lines_after(self.path, first_step)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a line for a step."""
        if self._board is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


class Window:
    """The steps since the last log line: their results on the device, and the time they took."""

    def __init__(self, accelerator: Accelerator, *, max_bad_steps: int) -> None:
        self.accelerator, self.max_bad_steps = accelerator, max_bad_steps
        self.bad_in_a_row = 0
        self._reset()

    def _reset(self) -> None:
        self.results: list[StepResult] = []
        self.started, self.waited, self.num_samples = time.perf_counter(), 0.0, 0

    def add(self, result: StepResult, *, num_samples: int, waited: float) -> None:
        """Remember a step; num_samples: over all processes; waited: seconds for data."""
        self.results.append(result)
        self.num_samples += num_samples
        self.waited += waited

    def close(self, step: int, ids: Sequence[str], *, rate: float) -> tuple[dict[str, float], int]:
        """Return the figures of the window that ends after `step`, and its skipped updates.

        ids: names of the samples by index. Raises FloatingPointError when too many updates in a
        row were skipped, with the step and the files.
        """
        table = torch.stack(
            [torch.stack([r.loss, r.grad_norm, r.ok.float()]) for r in self.results]
        )  # (steps, 3)
        buckets = torch.stack(
            [
                torch.stack([r.bucket_losses for r in self.results]).nansum(0),
                torch.stack([r.bucket_counts for r in self.results]).sum(0),
            ]
        )
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
        for b in range(NUM_BUCKETS):
            if buckets[1, b] > 0:
                figures[f"loss/t_quarter_{b}"] = (buckets[0, b] / buckets[1, b]).item()
        self._reset()
        return figures, skipped

    def _judge(self, ok: list[bool], step: int, ids: Sequence[str]) -> None:
        first = step - len(ok) + 1
        for offset, fine in enumerate(ok):
            self.bad_in_a_row = 0 if fine else self.bad_in_a_row + 1
            if self.bad_in_a_row >= self.max_bad_steps:
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
    temporary = path.with_name(".metrics.jsonl.partial")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
