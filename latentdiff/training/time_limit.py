"""A learning rate that ends with the steps or with the minutes, whichever comes first."""

import math
import time


class TimedRate:
    """A linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017, Eq. 5)."""

    def __init__(
        self, base: float, *, warmup_steps: int, max_steps: int, max_minutes: float = 0.0
    ) -> None:
        """max_minutes: counted from here; 0: no limit."""
        self.base, self.warmup_steps = base, warmup_steps
        self.max_steps, self.max_minutes = max_steps, max_minutes
        self._started = time.monotonic()

    def at(self, step: int) -> float | None:
        """Return the rate of step `step`, counted from 0, or None when the run is at its end."""
        minutes = (time.monotonic() - self._started) / 60
        by_time = minutes / self.max_minutes if self.max_minutes else 0.0
        done = max(step / self.max_steps, by_time)
        if done >= 1.0:
            return None
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.base * warm * (1 + math.cos(math.pi * done)) / 2
