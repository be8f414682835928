"""The results of diffusion steps between two log lines: their figures, and the skipped updates."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from latentdiff.evaluation.metrics.heldout_loss import (
    bucket_labels,
)
from latentdiff.training.checkpoint import Parts
from latentdiff.training.metrics_log import WINDOW
from latentdiff.training.text_to_image.train_step import StepResult


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
        losses = self.accelerator.reduce(table[:, 0].contiguous(), "sum").cpu()
        buckets = self._buckets().sum(0).cpu()
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

    def tensors(self) -> Parts:
        """Return what a checkpoint holds of these steps, of all processes: nothing at a log line.

        So a resumed run logs, and counts as skipped, what the run that never stopped does.
        """
        if not self.results:
            return {}
        bucket_losses, bucket_counts = self._buckets().unbind(1)
        losses = torch.stack([result.loss for result in self.results])
        window = {
            "loss": self.accelerator.reduce(losses, "sum"),
            "bucket_losses": bucket_losses,
            "bucket_counts": bucket_counts,
            "grad_norm": torch.stack([result.grad_norm for result in self.results]),
            "ok": torch.stack([result.ok for result in self.results]),
            "indices": torch.cat([result.indices for result in self.results]),
            "num_indices": torch.tensor([len(result.indices) for result in self.results]),
        }
        return {WINDOW: window}

    def load(self, tensors: Parts, *, skipped_in_a_row: int) -> None:
        """Take them back; earlier versions saved none."""
        self.skipped_in_a_row = skipped_in_a_row
        if not (window := dict(tensors.get(WINDOW, {}))):
            return
        if not self.accelerator.is_main_process:  # the main one has the sums
            for name in ("loss", "bucket_losses", "bucket_counts"):
                window[name] = torch.zeros_like(window[name])
        indices = window.pop("indices").split(window.pop("num_indices").tolist())
        on_device = {name: tensor.to(self.accelerator.device) for name, tensor in window.items()}
        self.results = [
            StepResult(**{name: tensor[k] for name, tensor in on_device.items()}, indices=one)
            for k, one in enumerate(indices)
        ]

    def _buckets(self) -> torch.Tensor:
        """Return losses and counts by timestep, of all processes, (steps, 2, NUM_BUCKETS)."""
        buckets = torch.stack(
            [torch.stack([r.bucket_losses, r.bucket_counts]) for r in self.results]
        )
        buckets = torch.where(torch.isfinite(buckets[:, :1]), buckets, 0.0)
        summed: torch.Tensor = self.accelerator.reduce(buckets, "sum")
        return summed

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
