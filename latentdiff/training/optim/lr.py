"""The learning rate: a pure function of the optimiser step.

Nothing of it is saved, and neither accumulation nor the number of processes can change it.
"""

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from latentdiff.config.choices import LRDecay


def learning_rate(
    step: int,
    *,
    base: float,
    schedule: LRDecay,
    lr_warmup_steps: int,
    max_steps: int,
    decay_from: int | None = None,
    final_fraction: float = 0.0,
) -> float:
    """Return the learning rate of optimiser step `step`, counted from 0.

    It rises linearly to `base` over lr_warmup_steps and stays, or falls as half a cosine
    (Loshchilov & Hutter 2017, Eq. 5) or a line, to final_fraction * base at max_steps. decay_from:
    the step at which the fall begins, by default after the warm-up, which it overlaps otherwise.
    """
    warmup = min(1.0, (step + 1) / lr_warmup_steps) if lr_warmup_steps > 0 else 1.0
    start = lr_warmup_steps if decay_from is None else decay_from
    done = (step - start) / max(1, max_steps - start)
    done = min(1.0, max(0.0, done))
    if schedule == "constant":
        left = 1.0
    elif schedule == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
    elif schedule == "linear":
        left = 1 - done
    else:
        raise ValueError(f"schedule is {schedule!r}, expected constant, cosine or linear")
    return base * warmup * (final_fraction + (1 - final_fraction) * left)


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate by optimiser step."""

    base: float
    text_base: float
    schedule: LRDecay
    lr_warmup_steps: int
    max_steps: int

    def at(self, step: int, *, text: bool = False) -> float:
        """Return the learning rate of optimiser step `step`, of the U-Net or the text encoder."""
        return learning_rate(
            step,
            base=self.text_base if text else self.base,
            schedule=self.schedule,
            lr_warmup_steps=self.lr_warmup_steps,
            max_steps=self.max_steps,
        )


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
