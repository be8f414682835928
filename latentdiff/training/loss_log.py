"""What the VAE and CLIP recipes say of their losses while they train."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm


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
