"""What a person sees of a run: a live bar in a terminal, lines in a log, and what to do next.

All of it goes to stderr, on the main process alone. The bar shows the figures of the last line of
metrics, so it never waits for the device. Does not answer for: the figures themselves, which
metrics_log.py writes.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

if TYPE_CHECKING:  # a report shows durations without it
    from latentdiff.evaluation.metrics.stopping import Verdict

logger = logging.getLogger(__name__)
LOG_INTERVAL_S = 30.0  # between two lines where there is no terminal
MANY_EPOCHS = 100  # from which on a tenth of one is no news
BAR_FORMAT = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt}{desc}"


def lines_above_bar() -> AbstractContextManager[None]:
    """Let log lines appear above the bar, and not in the middle of it."""
    return logging_redirect_tqdm()


class Progress:
    """The steps of a run, from first_step to max_steps, as a person watches them.

    steps_per_epoch: 0 where a recipe counts no epochs; they are shown next to the steps. A terminal
    shows a bar; where stderr is a file or a pipe a line is logged every LOG_INTERVAL_S seconds, and
    for the last step.
    """

    def __init__(
        self, first_step: int, max_steps: int, *, steps_per_epoch: float, is_main: bool
    ) -> None:
        self.max_steps, self.steps_per_epoch, self.is_main = max_steps, steps_per_epoch, is_main
        self._step = self._logged_step = self._first_step = first_step
        self._shown: dict[str, str] = {}
        self._seconds_per_step: float | None = None
        self._last_line = -LOG_INTERVAL_S
        self._bar = tqdm(
            initial=first_step,
            total=max_steps,
            dynamic_ncols=True,
            bar_format=BAR_FORMAT,
            disable=not (is_main and sys.stderr.isatty() and first_step < max_steps),
            desc=", starting" if first_step else ", starting with a sheet of samples",
        )

    def advance(self) -> None:
        """Count a step that was taken."""
        self._step += 1
        self._describe()
        self._bar.update()

    def show(
        self, step: int, figures: Mapping[str, float], *, seconds: float, paused: float = 0.0
    ) -> None:
        """Show a line of metrics, of the `seconds` since the last one, previews not counted.

        paused: seconds of previews and evaluation since the first step, a share of which every step
        that is left is expected to take too.
        """
        self._step = step
        if (num := step - self._logged_step) > 0:
            self._seconds_per_step = seconds / num + paused / (step - self._first_step)
        self._logged_step = step
        self._shown |= {
            "loss": f"loss {figures['loss']:.4f}",
            "speed": f"{figures['images_per_second']:.3g} img/s",
            "memory": f"{figures['memory_gb']:.1f} GB",
        }
        if "prodigy_d" in figures:
            self._shown["prodigy_d"] = f"d {figures['prodigy_d']:.2g}"
        self._describe()
        now = time.monotonic()
        is_due = now - self._last_line >= LOG_INTERVAL_S or step == self.max_steps
        if self.is_main and self._bar.disable and is_due:
            self._last_line = now
            logger.info("step %d of %d, %s", step, self.max_steps, self.text())

    def show_heldout(self, step: int, loss: float, *, before: tuple[int, float] | None) -> None:
        """Log the held-out loss of a step, and its change since the one before: (step, loss)."""
        self._shown["heldout"] = f"held-out {loss:.4f}"
        self._describe()
        if self.is_main:
            change = f" ({loss - before[1]:+.4f} since step {before[0]})" if before else ""
            logger.info("held-out loss after step %d: %.4f%s", step, loss, change)

    def show_verdict(self, verdict: Verdict, measure: str) -> None:
        """Log the verdict on an evaluation with its interval, and show it until the next."""
        self._shown["verdict"] = verdict.name
        self._describe()
        if self.is_main:
            logger.info("after step %d: %s", verdict.step, verdict_text(verdict, measure))

    def text(self) -> str:
        """Return the figures as one line, those that matter most first."""
        parts = [
            self._shown[name] for name in ("loss", "heldout", "verdict") if name in self._shown
        ]
        if self._seconds_per_step is not None:
            left = self._seconds_per_step * (self.max_steps - self._step)
            parts.insert(0, f"{tqdm.format_interval(left)} left")
        names = ("prodigy_d", "speed", "memory")
        parts += [self._shown[name] for name in names if name in self._shown]
        if self.steps_per_epoch > 1:  # else the steps say it already
            done, total = (n / self.steps_per_epoch for n in (self._step, self.max_steps))
            digits = 1 if total < MANY_EPOCHS else 0
            parts.append(f"epoch {done:,.{digits}f} of {total:,.{digits}f}")
        return ", ".join(parts)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _describe(self) -> None:
        if not self._bar.disable:
            text = self.text()  # empty until the first figures
            self._bar.set_description_str(text and f", {text}", refresh=False)


def verdict_text(verdict: Verdict, measure: str) -> str:
    """Say a verdict with its interval: flat, held-out loss +0.0012 [-0.0010, +0.0034] ..."""
    change = verdict.change
    return (
        f"{verdict.name}, {measure} {change.estimate:+.4f} [{change.low:+.4f}, {change.high:+.4f}] "
        f"against step {verdict.compared_step}, {change.level:.0%} interval over "
        f"{change.num_samples} pairs; best so far: step {verdict.best_step}"
    )


def duration_text(seconds: float) -> str:
    """Write a duration: 42 s, 3 min 5 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
